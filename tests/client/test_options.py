"""The options of generations: each is a parameter that people, editors and the wire know."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_type_hints

import jedi
import pytest

from kvmesh import (
    UNSET,
    AsyncClient,
    ChatOptions,
    Client,
    FakeTransport,
    GenerateOptions,
    InvalidRequestError,
    UnknownOptionError,
)
from kvmesh.client.generate import HERE, blocking, written
from kvmesh.protos import pb

METHODS = ("generate", "generate_stream", "chat", "chat_stream")
# What other arguments make up.
NOT_OPTIONS = {"prompt", "sampling_params", "resume", "messages"}
# In the contract ahead of the servers' support.
NOT_YET = {"adapter"}


def fields_of_the_contract(method: str) -> set[str]:
    messages: list[Any] = [
        pb.GenerateRequest,
        pb.SamplingParams,
        *([pb.Chat] if "chat" in method else []),
    ]
    fields = {field.name for message in messages for field in message.DESCRIPTOR.fields}
    return fields - NOT_OPTIONS - NOT_YET


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_every_field_of_the_contract_is_a_parameter(kind: type, name: str) -> None:
    method = getattr(kind, name)
    _, _, *parameters, unknown = inspect.signature(method).parameters.values()
    assert unknown.kind is inspect.Parameter.VAR_KEYWORD
    assert {parameter.name for parameter in parameters} == fields_of_the_contract(name)
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert defaults.pop("timeout_s") is UNSET
    assert set(defaults.values()) == {None}
    hints, declared = (
        get_type_hints(method),
        get_type_hints(ChatOptions if "chat" in name else GenerateOptions),
    )
    assert {n: hints[n] for n in declared} == {
        n: kind if n == "timeout_s" else kind | None for n, kind in declared.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_gives_the_default_of_every_option(name: str) -> None:
    doc = inspect.getdoc(getattr(Client, name)) or ""
    assert set(re.findall(r"^(\w+): \[.+?\] .+$", doc, re.MULTILINE)) == fields_of_the_contract(
        name
    )


def completions(text: str) -> set[str]:
    """What an editor proposes at the end of a program."""
    line = text.count("\n") + 1
    column = len(text.splitlines()[-1])
    found = jedi.Script(text).complete(line, column)
    return {completion.name.removesuffix("=") for completion in found}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_an_editor_completes_every_option(kind: str, name: str) -> None:
    program = f"from kvmesh import {kind}\nclient = {kind}()\nclient.{name}([], "
    assert fields_of_the_contract(name) <= completions(program)


def test_an_editor_knows_what_a_call_returns() -> None:
    program = "from kvmesh import Client\nclient = Client()\n"
    assert {"text", "usage", "choices"} <= completions(f"{program}client.generate('hi').")
    assert {"events", "cursor", "usage"} <= completions(f"{program}client.chat_stream([]).")
    assert {"token_ids", "text"} <= completions(
        f"{program}for d in client.chat_stream([]):\n    d."
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tempreature", "did you mean temperature?"),
        ("max_new_tokens", "did you mean max_tokens?"),
        ("num_return_sequences", "did you mean n?"),
        ("timeout", "did you mean timeout_s?"),
        ("tools", "it is an option of chats"),
        ("prompt_token_ids", "is not an option"),
        ("sampling_params", "is not an option"),
        ("resume", "is not an option"),
        ("zzz", "there are .*temperature"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_an_unknown_option_is_named_with_the_one_that_was_meant(
    name: str, hint: str, method: str
) -> None:
    fake = FakeTransport()
    options: dict[str, Any] = {name: 1}
    with pytest.raises(UnknownOptionError, match=hint) as caught:
        getattr(Client(transport=fake), method)("hi", **options)
    assert caught.value.field == name
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, InvalidRequestError)
    assert not fake.server.requests


def test_type_checkers_know_all_options() -> None:
    with pytest.raises(UnknownOptionError):
        Client(transport=FakeTransport()).generate("hi", tempreature=1.0)  # type: ignore[arg-type]


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("generate", {"prompt": 5}, "prompt", "text, messages or token ids"),
    ("generate", {"prompt": None}, "prompt", "text, messages or token ids"),
    ("generate", {"prompt": {"role": "user"}}, "prompt", "text, messages or token ids"),
    ("generate", {"prompt": b"hi"}, "prompt.token_ids", "a list, each item a whole number"),
    ("generate", {"prompt": ["hi"]}, "prompt.token_ids", "whole number"),
    ("generate", {"prompt": [-1]}, "prompt.token_ids", "whole number from 0"),
    ("generate", {"temperature": "hot"}, "sampling_params.temperature", "a number"),
    ("generate", {"temperature": True}, "sampling_params.temperature", "a number"),
    ("generate", {"max_tokens": 2.5}, "sampling_params.max_tokens", "a whole number"),
    ("generate", {"max_tokens": 2**31}, "sampling_params.max_tokens", "2\\^31 - 1"),
    ("generate", {"n": [1]}, "sampling_params.n", "a whole number"),
    ("generate", {"seed": -1}, "sampling_params.seed", "from 0 to 2\\^64 - 1"),
    ("generate", {"stop": 5}, "sampling_params.stop", "a list, each item text"),
    ("generate", {"stop": [5]}, "sampling_params.stop", "a list, each item text"),
    ("generate", {"stop_token_ids": 5}, "sampling_params.stop_token_ids", "a list"),
    ("generate", {"logit_bias": [5]}, "sampling_params.logit_bias", "a mapping"),
    ("generate", {"logit_bias": {"a": 1}}, "sampling_params.logit_bias", "a mapping"),
    ("generate", {"ignore_eos": "yes"}, "sampling_params.ignore_eos", "True or False"),
    ("generate", {"request_id": 5}, "request_id", "text"),
    ("generate", {"allowed_kv_formats": "int8"}, "allowed_kv_formats", "a list"),
    ("chat", {"messages": "hello"}, "messages", "a list of messages"),
    ("chat", {"messages": {"role": "user", "content": "x"}}, "messages", "a list of messages"),
    ("chat", {"messages": None}, "messages", "a list of messages"),
    ("chat", {"messages": ["hello"]}, "prompt.chat.messages[0]", "must have a role"),
    ("chat", {"messages": [], "tools": "f"}, "tools", "a list of tools"),
    ("chat", {"messages": [], "tools": {"name": "f"}}, "tools", "a list of tools"),
    ("chat", {"messages": [], "chat_template": 5}, "prompt.chat.chat_template", "text"),
]


@pytest.mark.parametrize(("method", "given", "field", "expected"), WRONG)
def test_a_wrong_argument_is_named_with_what_was_expected(
    method: str, given: dict[str, Any], field: str, expected: str
) -> None:
    fake = FakeTransport()
    first = "messages" if method == "chat" else "prompt"
    given = {first: "hi", **given}
    with pytest.raises(InvalidRequestError, match=expected) as caught:
        getattr(Client(transport=fake), method)(given.pop(first), **given)
    assert caught.value.field == field
    for word in ("proto", "kvmesh.v1", "descriptor", "upb", "NoneType", "SamplingParams"):
        assert word not in str(caught.value)
    assert not fake.server.requests


def test_none_is_the_servers_default() -> None:
    fake = FakeTransport()
    options: dict[str, Any] = dict.fromkeys(fields_of_the_contract("generate"))
    Client(transport=fake, timeout_s=5.0).generate("hi", **options)
    sent = fake.server.requests[0]
    assert {field.name for field, _ in sent.ListFields()} == {"prompt", "request_id"}


def test_a_dictionary_of_options_can_be_passed() -> None:
    fake = FakeTransport(["one two three"])
    options: GenerateOptions = {"max_tokens": 2, "n": 2}
    completion = Client(transport=fake).generate("hi", **options)
    assert [choice.text for choice in completion.choices] == ["one two"] * 2


def test_the_written_files_are_current() -> None:
    for name, source in written().items():
        assert (HERE / name).read_text("utf-8") == source, f"client/{name}: run `make sdk`"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("async def f() -> AsyncStream: ...", "def f() -> Stream: ..."),
        ("    async with AsyncClient() as c:", "    with Client() as c:"),
        ("raise StopAsyncIteration", "raise StopIteration"),
        ("await stream.aclose()", "stream.close()"),
        ("def __aiter__(self): return await anext(self)", "def __iter__(self): return next(self)"),
        ("from kvmesh.client.async_stream import AsyncStream",
         "from kvmesh.client.sync_stream import Stream"),
        ("an asynchronous awaitable", "an asynchronous awaitable"),
    ],
)  # fmt: skip
def test_the_blocking_form_of_code(source: str, expected: str) -> None:
    assert blocking(source) == expected
