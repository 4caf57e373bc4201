"""The methods of both clients: what is sent, and what is returned."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import threading
from typing import Any, get_type_hints

import numpy as np
import pytest

import kvmesh
from kvmesh import (
    AsyncClient,
    AsyncFakeTransport,
    ChatOptions,
    Client,
    ClosedError,
    FakeTransport,
    FinishReason,
    InvalidRequestError,
    Message,
    Messages,
    ProtocolError,
)
from kvmesh.client import responses, types
from kvmesh.protos import admin, pb
from tests.client.servicer import ScriptedServicer, answering, serving

ALL_OPTIONS: ChatOptions = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "seed": 2**64 - 1,
    "max_tokens": 17,
    "min_tokens": 3,
    "stop": ["\n", "ende 漢"],
    "stop_token_ids": [7, 8],
    "ignore_eos": True,
    "logit_bias": {5: -100.0, 6: 1.5},
    "logprobs": 0,
    "prompt_logprobs": 1,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "n": 2,
    "request_id": "mine",
    "model": "some-model",
    "priority": -3,
    "timeout_s": 60.0,
    "allowed_kv_formats": ["int8", "exact"],
    "max_kv_divergence_nats": 0.01,
    "cache_salt": "salt",
    "pin_s": 600.0,
    "tools": [],
    "chat_template_kwargs": {},
    "continue_final_message": True,
    "chat_template": "{{ messages }}",
    "chat_template_name": "rag",
    "max_reasoning_tokens": 0,
    "structured_output": {"regex": "[a-z]+"},
    "tool_choice": {"name": "f"},
    "parallel_tool_calls": False,
}


def test_every_option_reaches_the_server_under_its_name() -> None:
    assert ALL_OPTIONS.keys() == get_type_hints(ChatOptions).keys()
    fake = FakeTransport()
    Client(transport=fake).chat([Message("user", "hi")], **ALL_OPTIONS)
    request = fake.server.requests[0]
    for name, value in ALL_OPTIONS.items():
        holder = next(
            message
            for message in (request, request.sampling_params, request.prompt.chat)
            if name in message.DESCRIPTOR.fields_by_name
        )
        sent = getattr(holder, name)
        if isinstance(value, list):
            sent = list(sent)
        elif name == "chat_template_kwargs":
            sent = dict(sent)
        elif isinstance(value, dict) and name != "logit_bias":
            sent = {sent.WhichOneof("kind"): getattr(sent, sent.WhichOneof("kind"))}
        assert sent == value, name
    parameters = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert parameters <= ALL_OPTIONS.keys()


def test_messages_may_be_as_openais_api_has_them() -> None:
    fake = FakeTransport()
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    Client(transport=fake).chat(
        [
            {"role": "user", "content": [{"type": "text", "text": "one"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            Message("assistant", tool_calls=[{"id": "c2", "name": "g", "arguments": {"y": 2}}]),
        ],
        tools=[
            {
                "type": "function",
                "function": {"name": "f", "description": "does", "parameters": schema},
            }
        ],
    )
    chat = fake.server.requests[0].prompt.chat
    assert [part.text for part in chat.messages[0].parts] == ["one"]
    (sent,) = chat.messages[1].tool_calls
    assert (sent.id, sent.name, sent.arguments_json) == ("c1", "f", '{"x": 1}')
    assert (chat.messages[2].tool_call_id, chat.messages[2].content) == ("c1", "2")
    (sent,) = chat.messages[3].tool_calls
    assert (sent.id, sent.name, json.loads(sent.arguments_json)) == ("c2", "g", {"y": 2})
    (tool,) = chat.tools
    assert (tool.name, tool.description) == ("f", "does")
    assert json.loads(tool.parameters_json) == schema


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"content": "x"}, "prompt.chat.messages[0]"),
        ({"role": "user", "text": "x"}, "prompt.chat.messages[0]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "prompt.chat.messages[0].parts[0]"),
        ({"role": "user", "tool_calls": ["f"]}, "prompt.chat.messages[0].tool_calls[0]"),
        ({"role": 5, "content": "x"}, "prompt.chat.messages[0].role"),
    ],
)
def test_messages_that_cannot_be_sent(message: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Client(transport=FakeTransport()).chat([message])
    assert caught.value.field == field


def test_options_that_are_left_out_stay_unset() -> None:
    fake = FakeTransport()
    Client(transport=fake).generate("hi")
    request = fake.server.requests[0]
    assert not request.sampling_params.ListFields()
    assert {field.name for field, _ in request.ListFields()} == {"prompt", "request_id"}


def test_zero_is_not_unset() -> None:
    fake = FakeTransport()
    Client(transport=fake).generate("hi", temperature=0, priority=0)
    request = fake.server.requests[0]
    assert request.sampling_params.HasField("temperature")
    assert request.HasField("priority")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": -1}, "sampling_params.seed"),
        ({"seed": 2**64}, "sampling_params.seed"),
        ({"max_tokens": 2**31}, "sampling_params.max_tokens"),
        ({"max_tokens": "many"}, "sampling_params.max_tokens"),
        ({"temperature": "hot"}, "sampling_params.temperature"),
        ({"stop_token_ids": [-1]}, "sampling_params.stop_token_ids"),
        ({"stop_token_ids": 5}, "sampling_params.stop_token_ids"),
        ({"stop": [5]}, "sampling_params.stop"),
        ({"stop": ["\ud800"]}, "sampling_params.stop"),
        ({"logit_bias": {-1: 1.0}}, "sampling_params.logit_bias"),
        ({"logit_bias": {1: "x"}}, "sampling_params.logit_bias"),
        ({"priority": 2**40}, "priority"),
        ({"request_id": 5}, "request_id"),
    ],
)
def test_values_that_no_message_can_hold_are_refused_by_name(options: Any, field: str) -> None:
    fake = FakeTransport()
    with pytest.raises(InvalidRequestError) as caught:
        Client(transport=fake).generate("hi", **options)
    assert caught.value.field == field
    assert not fake.server.requests


def test_out_of_range_values_are_left_to_the_server() -> None:
    fake = FakeTransport()
    Client(transport=fake).generate("", temperature=float("nan"), max_tokens=-1, top_k=-5, n=-2)
    assert fake.server.requests[0].sampling_params.max_tokens == -1


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([-1], "prompt.token_ids"),
        ([2**32], "prompt.token_ids"),
        ([1.5], "prompt.token_ids"),
        (b"bytes", "prompt.token_ids"),
        ("\ud800", "prompt.text"),
    ],
)
def test_prompts_that_cannot_be_sent(prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Client(transport=FakeTransport()).generate(prompt)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "message",
    [{"content": "x"}, {"role": "user", "content": "x", "age": "y"}, "user: hi", 5],
)
def test_invalid_messages_are_refused(message: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Client(transport=FakeTransport()).chat([Message("user", "hi"), message])
    assert caught.value.field == "prompt.chat.messages[1]"


def test_prompts_of_each_kind() -> None:
    fake = FakeTransport()
    client = Client(transport=fake)
    messages: Messages = [Message("system", "Sei nett. 🙂"), {"role": "user", "content": "漢字"}]
    client.generate("Grüße\0")
    client.generate([1, 2, 3])
    client.generate((1, 2))
    client.generate(np.arange(4, dtype=np.int32))  # type: ignore[arg-type]
    client.chat(messages)
    client.tokenize(messages)
    list(client.chat_stream(messages))
    kinds = [request.prompt.WhichOneof("kind") for request in fake.server.requests]
    assert kinds == ["text", *["token_ids"] * 3, *["chat"] * 3]
    assert fake.server.requests[0].prompt.text == "Grüße\0"
    assert list(fake.server.requests[3].prompt.token_ids.ids) == [0, 1, 2, 3]
    chat = fake.server.requests[4].prompt.chat
    assert [(m.role, m.content) for m in chat.messages] == [
        ("system", "Sei nett. 🙂"),
        ("user", "漢字"),
    ]


def test_a_million_token_ids_go_through() -> None:
    ids = list(range(49_152)) * 21
    servicer = ScriptedServicer(lambda request, context: pb.TokenizeResponse(
        token_ids=request.prompt.token_ids.ids, max_model_len=2**20
    ))  # fmt: skip
    with serving(servicer) as target, Client(target) as client:
        assert client.tokenize(ids).token_ids == tuple(ids)


def filled(message: Any, start: int = 1) -> Any:
    """Set every field of a message to a distinct value, recursively."""
    for number, field in enumerate(message.DESCRIPTOR.fields, start):
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)["key"] = number
        elif field.message_type is not None:
            value = getattr(message, field.name)
            filled(value.add() if field.is_repeated else value, number + 1)
        elif field.is_repeated:
            values: list[Any] = [number, number + 1]
            if field.type == field.TYPE_STRING:
                values = [f"text {value}" for value in values]
            getattr(message, field.name).extend(values)
        elif field.type == field.TYPE_STRING:
            setattr(message, field.name, f"text {number}")
        elif field.type == field.TYPE_BOOL:
            setattr(message, field.name, True)
        elif field.type == field.TYPE_ENUM:
            setattr(message, field.name, 1)
        else:
            setattr(message, field.name, number)
    return message


def assert_mirrors(value: Any, message: Any) -> None:
    names = [field.name for field in message.DESCRIPTOR.fields]
    assert {field.name for field in dataclasses.fields(value)} == set(names)
    for name in names:
        got, sent = getattr(value, name), getattr(message, name)
        if dataclasses.is_dataclass(got):
            assert_mirrors(got, sent)
        elif isinstance(got, tuple) and got and dataclasses.is_dataclass(got[0]):
            for part, sent_part in zip(got, sent, strict=True):
                assert_mirrors(part, sent_part)
        elif isinstance(got, tuple):
            assert got == tuple(sent)
        else:
            assert got == sent
        assert got, f"{name} was filled"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (types.Estimate, pb.EstimateBudgetResponse),
        (types.Explanation, pb.ExplainResponse),
        (types.ModelInfo, pb.GetModelInfoResponse),
        (types.TenantLoads, pb.GetTenantLoadsResponse),
        (types.Loads, admin.GetLoadsResponse),
        (types.GroupFacts, admin.GroupFacts),
        (types.Usage, pb.Usage),
        (types.Started, pb.Started),
        (types.Queued, pb.Queued),
        (types.Prefilling, pb.Prefilling),
        (types.Tokens, pb.TokenizeResponse),
    ],
)
def test_results_have_every_field_of_their_message(cls: Any, message: Any) -> None:
    assert_mirrors(responses.mirror(cls, filled(message())), filled(message()))


def test_unset_optional_numbers_are_none() -> None:
    assert responses.mirror(types.Usage, pb.Usage()).time_to_first_token_s is None
    assert responses.mirror(types.Queued, pb.Queued(projected_wait_s=0)).projected_wait_s == 0


def test_a_reply_may_be_larger_than_grpcs_default() -> None:
    """Such as the log-probabilities of a long prompt."""
    reply = pb.GenerateResponse(choices=[pb.Choice(text="x" * 5_000_000)])
    with serving(ScriptedServicer(answering(reply))) as target, Client(target) as client:
        assert len(client.generate("hi").text) == 5_000_000


def test_all_fields_of_a_completion() -> None:
    reply = pb.GenerateResponse(
        request_id="r",
        model="m",
        seed=9,
        choices=[
            pb.Choice(
                index=0,
                text="Ja.",
                token_ids=[1, 2],
                finish_reason=pb.FINISH_REASON_STOP,
                matched_stop_token_id=0,
                logprobs=pb.Logprobs(
                    chosen=[-0.5, -0.25],
                    chosen_bytes=[b"Ja", b"\xe6"],
                    top_token_ids=[3, 4],
                    top=[-1.5, -2.5],
                    top_bytes=[b"No", b"?"],
                ),
            ),
            pb.Choice(index=1, finish_reason=pb.FINISH_REASON_STOP, matched_stop_string="."),
            pb.Choice(index=2, finish_reason=pb.FINISH_REASON_DEADLINE),
            pb.Choice(
                index=3,
                finish_reason=pb.FINISH_REASON_TOOL_CALLS,
                reasoning="hm",
                tool_calls=[pb.ToolCall(id="c", name="f", arguments_json='{"x": 1}')],
            ),
        ],
        usage=pb.Usage(completion_tokens=3, time_to_first_token_s=1.0, total_s=2.0),
    )
    with serving(ScriptedServicer(answering(reply))) as target, Client(target) as client:
        completion = client.generate("hi")
    assert completion.text == "Ja."
    first, second, third, fourth = completion.choices
    assert (fourth.reasoning, fourth.finish_reason) == ("hm", "tool_calls")
    assert fourth.tool_calls == (types.ToolCall("c", "f", '{"x": 1}'),)
    assert fourth.tool_calls[0].arguments == {"x": 1}
    assert first.matched_stop == 0, "token 0 is a valid token"
    assert first.logprobs == (
        types.TokenLogprobs(
            types.TokenLogprob(1, "Ja", -0.5, (0x4A, 0x61)),
            (types.TokenLogprob(3, "No", -1.5, (0x4E, 0x6F)),),
        ),
        types.TokenLogprobs(
            types.TokenLogprob(2, "\ufffd", -0.25, (0xE6,)),
            (types.TokenLogprob(4, "?", -2.5, (0x3F,)),),
        ),
    )
    assert json.loads(json.dumps(dataclasses.asdict(completion)))["choices"][0]["text"] == "Ja."
    assert second.matched_stop == "."
    assert third.finish_reason is FinishReason.DEADLINE
    assert third.matched_stop is None
    assert completion.usage.tokens_per_s == pytest.approx(2.0)


@pytest.mark.parametrize("usage", [pb.Usage(), pb.Usage(completion_tokens=1, total_s=1.0),
                                   pb.Usage(completion_tokens=5, time_to_first_token_s=1.0,
                                            total_s=1.0)])  # fmt: skip
def test_a_rate_needs_two_tokens_and_a_duration(usage: pb.Usage) -> None:
    assert responses.mirror(types.Usage, usage).tokens_per_s is None


def test_a_finish_reason_from_a_newer_server_loses_nothing() -> None:
    new: Any = 99
    reply = pb.GenerateResponse(choices=[pb.Choice(text="Ja.", finish_reason=new)])
    with serving(ScriptedServicer(answering(reply))) as target, Client(target) as client:
        choice = client.generate("hi").choices[0]
    assert choice.text == "Ja."
    assert (choice.finish_reason, choice.finish_reason_number) == (FinishReason.OTHER, 99)


def test_a_reply_without_choices_violates_the_contract() -> None:
    with (
        serving(ScriptedServicer(answering(pb.GenerateResponse()))) as target,
        Client(target) as client,
        pytest.raises(ProtocolError),
    ):
        client.generate("hi")


def test_an_estimate_takes_a_prompt_or_its_length() -> None:
    client = Client(transport=FakeTransport())
    assert client.estimate("one two").prompt_tokens == 2
    assert client.estimate(prompt_tokens=10**6, max_tokens=5).prompt_tokens == 10**6
    for arguments in ({}, {"prompt": "x", "prompt_tokens": 1}):
        with pytest.raises(InvalidRequestError, match="exactly one"):
            client.estimate(**arguments)  # type: ignore[arg-type]


async def test_everything_that_an_estimate_is_given_is_sent() -> None:
    options: dict[str, Any] = {
        "max_tokens": 5,
        "n": 2,
        "priority": 1,
        "allowed_kv_formats": ["int8", "exact"],
        "max_kv_divergence_nats": 0.25,
        "model": "m",
    }
    fake, async_fake = FakeTransport(), AsyncFakeTransport()
    Client(transport=fake).estimate(prompt_tokens=7, **options)
    await AsyncClient(transport=async_fake).estimate(prompt_tokens=7, **options)
    want = pb.EstimateBudgetRequest(prompt_tokens=7, **options)
    assert fake.server.requests == async_fake.server.requests == [want]
    fields = {field.name for field in want.DESCRIPTOR.fields}
    assert fields - {"prompt", "prompt_tokens"} == options.keys()
    Client(transport=fake).estimate("one two", max_tokens=None)
    prompt = pb.Prompt(text="one two")
    assert fake.server.requests[1] == pb.EstimateBudgetRequest(prompt=prompt), "the rest is unset"


def test_abort_of_a_running_stream() -> None:
    fake = FakeTransport(["a b c"])
    client = Client(transport=fake)
    stream = client.generate_stream("hi")
    next(iter(stream))
    assert client.abort(stream.request_id) is False, "the loop has ended"
    with client.generate_stream("hi") as stream:
        iterator = iter(stream)
        next(iterator)
        assert client.abort(stream.request_id) is True
    assert fake.server.open_streams == 0


def test_a_closed_client_raises() -> None:
    for client in (Client(transport=FakeTransport()), Client("localhost:1")):
        client.close()
        with pytest.raises(ClosedError):
            client.loads()
        with pytest.raises(ClosedError):
            list(client.generate_stream("hi"))


async def test_a_closed_async_client_raises() -> None:
    for client in (AsyncClient(transport=AsyncFakeTransport()), AsyncClient("localhost:1")):
        await client.close()
        with pytest.raises(ClosedError):
            await client.loads()


async def test_every_method_of_the_async_client() -> None:
    fake = AsyncFakeTransport(["eins zwei"])
    async with AsyncClient(transport=fake) as client:
        assert (await client.generate("hi")).text == "eins zwei"
        assert (await client.chat([Message("user", "hi")])).text == "eins zwei"
        assert [d.text async for d in client.chat_stream([Message("user", "hi")])] == [
            "eins",
            " zwei",
            "",
        ]
        assert len((await client.tokenize("a b c")).token_ids) == 3
        assert (await client.estimate(prompt_tokens=5)).feasible_now
        assert (await client.model_info()).model == "fake"
        assert await client.abort("nothing") is False
        assert (await client.loads()).groups == ()


def test_both_clients_have_the_same_interface() -> None:
    def surface(cls: type) -> dict[str, Any]:
        return {
            name: (list(inspect.signature(member).parameters.values()))
            for name, member in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }

    assert surface(Client) == surface(AsyncClient)
    assert len(surface(Client)) <= 16
    for name in surface(Client):
        blocking, asynchronous = getattr(Client, name), getattr(AsyncClient, name)
        assert blocking.__doc__ == asynchronous.__doc__
        if not name.endswith("_stream") and name != "resume":
            hints, async_hints = get_type_hints(blocking), get_type_hints(asynchronous)
            assert hints["return"] == async_hints["return"]


def test_a_client_can_be_shared_between_threads() -> None:
    servicer = ScriptedServicer(
        lambda request, context: pb.TokenizeResponse(token_ids=[int(request.prompt.text)])
    )
    got: dict[int, tuple[int, ...]] = {}
    with serving(servicer) as target, Client(target) as client:

        def work(first: int) -> None:
            for number in range(first, first + 20):
                got[number] = client.tokenize(str(number)).token_ids

        threads = [threading.Thread(target=work, args=(n * 100,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 160
    assert all(ids == (number,) for number, ids in got.items())


async def test_concurrent_calls_of_one_async_client() -> None:
    servicer = ScriptedServicer(
        lambda request, context: pb.TokenizeResponse(token_ids=[int(request.prompt.text)])
    )
    with serving(servicer) as target:
        async with AsyncClient(target) as client:
            results = await asyncio.gather(*(client.tokenize(str(n)) for n in range(100)))
    assert [tokens.token_ids for tokens in results] == [(n,) for n in range(100)]


def test_the_example_in_the_fake_modules_docstring() -> None:
    fake = FakeTransport(["Paris", "Rome"])
    client = Client(transport=fake)
    assert client.generate("The capital of France is").text == "Paris"
    fake.server.fail(kvmesh.OverCapacityError("full", retry_after_s=1.0))
    assert client.generate("The capital of Italy is").text == "Rome"
    assert fake.server.slept_s >= 1.0
    with pytest.raises(ValueError, match="answers"):
        FakeTransport([])


def test_every_public_name_is_importable_from_the_top() -> None:
    assert set(kvmesh.__all__) == set(kvmesh.client.__all__)
    for name in kvmesh.__all__:
        assert getattr(kvmesh, name) is getattr(kvmesh.client, name)
