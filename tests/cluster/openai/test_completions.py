"""Completions: prompts of every kind, log-probabilities, and streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from tests.cluster.openai.server import (
    HttpServer,
    ScriptedContract,
    delta,
    finished,
    started,
    usage,
    words,
)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [pb.Prompt(text="a")]),
        (["a"], [pb.Prompt(text="a")]),
        (["a", "b"], [pb.Prompt(text="a"), pb.Prompt(text="b")]),
        ([1, 2], [pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2]))]),
        (
            [[1], [2, 3]],
            [pb.Prompt(token_ids=pb.TokenIds(ids=ids)) for ids in ([1], [2, 3])],
        ),
    ],
)
async def test_prompts(
    server: HttpServer, contract: ScriptedContract, prompt: Any, expected: list[pb.Prompt]
) -> None:
    async with server.client() as client:
        reply = await client.completions.create(model="m", prompt=prompt, n=2)
    assert sorted(str(request.prompt) for request in contract.requests) == sorted(
        map(str, expected)
    )
    assert [choice.index for choice in reply.choices] == list(range(2 * len(expected)))
    assert {choice.text for choice in reply.choices} == {"Hello there."}
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 5 * len(expected)
    assert reply.usage.completion_tokens == 4 * len(expected)
    ids = [request.request_id for request in contract.requests]
    assert len(set(ids)) == len(expected)
    assert all(reply.id == f"cmpl-{request_id}"[: len(reply.id)] for request_id in ids)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": 5}, "prompt", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt[1]", "must be a whole number"),
        ({"prompt": ["a", 1]}, "prompt[1]", "must be a string"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]", "must be a whole number"),
        ({"prompt": [-1]}, "prompt", "token ids from 0"),
        ({"prompt": [[-1]]}, "prompt[0]", "token ids from 0"),
        ({"prompt": [[1], [1 << 32]]}, "prompt[1]", "token ids from 0"),
        ({"prompt": ["a"] * 1025}, "prompt", "at most 1024 prompts, got 1025"),
        ({"suffix": "b"}, "suffix", "is not supported"),
        ({"best_of": 3}, "best_of", "must be equal to n"),
        ({"max_tokens": 0}, "max_tokens", "unless echo or pin_s is set"),
        ({"logprobs": True}, "logprobs", "must be a whole number"),
        ({"messages": []}, "messages", "not a field"),
    ],
)
async def test_bad_fields_are_named(
    server: HttpServer, contract: ScriptedContract, fields: dict[str, Any], param: str, message: str
) -> None:
    reply = await server.post("/v1/completions", {"prompt": "a", **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param and message in error["message"]
    assert not contract.requests


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([7, 99], "prompt[1]"),
        ([[7, 99]], "prompt[0][1]"),
        ([[1, 2, 3, 4, 7, 99], [1]], "prompt[0][5]"),
        ([[1], [99]], "prompt[1][0]"),
        ("99", "prompt"),
        (["99"], "prompt[0]"),
        (["a", "99"], "prompt[1]"),
    ],
)
async def test_an_error_names_the_prompt(
    server: HttpServer, contract: ScriptedContract, prompt: Any, param: str
) -> None:
    """Of a generation, and of the questions that an echo asks."""

    def check(field: str, ids: Sequence[int]) -> None:
        if 99 in ids:
            raise InvalidFieldError(f"{field}[{list(ids).index(99)}]", "is not a valid token id")

    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        if request.prompt.text == "99":
            raise InvalidFieldError("prompt.text", "is too long")
        check("prompt.token_ids.ids", request.prompt.token_ids.ids)
        yield from words("a")(request)

    async def refuse_99(request: pb.DetokenizeRequest, tenant: str) -> pb.DetokenizeResponse:
        check("token_ids", request.token_ids)
        return pb.DetokenizeResponse(text="a", token_bytes=[b"a"])

    contract.script = play
    contract.detokenize = refuse_99  # type: ignore[method-assign]
    for echo in (False, True):
        reply = await server.post("/v1/completions", {"prompt": prompt, "echo": echo})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == param


async def test_a_prompt_alone_may_be_pinned_by_field_or_header(
    server: HttpServer, contract: ScriptedContract
) -> None:
    body = {"prompt": "a", "max_tokens": 0}
    assert (await server.post("/v1/completions", {**body, "pin_s": 60})).status_code == 200
    assert (await server.post("/v1/completions", body, x_kvmesh_pin_s="60")).status_code == 200
    assert [request.pin_s for request in contract.requests] == [60, 60]


async def test_best_of_that_changes_nothing(server: HttpServer) -> None:
    body = {"prompt": "a", "n": 2, "best_of": 2, "suffix": None, "echo": False}
    assert (await server.post("/v1/completions", body)).status_code == 200


def scores(*tokens: str, width: int = 1) -> pb.Logprobs:
    """Each token twice as likely as the alternatives."""
    return pb.Logprobs(
        chosen=[-0.5] * len(tokens),
        chosen_bytes=[token.encode() for token in tokens],
        top=[-1.0] * len(tokens) * width,
        top_bytes=[b"?"] * len(tokens) * width,
        top_token_ids=[9] * len(tokens) * width,
    )


async def test_log_probabilities_are_columns(
    server: HttpServer, contract: ScriptedContract
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        yield delta("Año", token_ids=[1, 2], logprobs=scores("A", "ño"))
        yield delta(" 1", token_ids=[3], logprobs=scores(" 1"))
        yield finished()
        yield usage()

    contract.script = play
    async with server.client() as client:
        reply = await client.completions.create(model="m", prompt="a", logprobs=1)
        stream = await client.completions.create(model="m", prompt="a", logprobs=1, stream=True)
        chunks = [chunk.choices[0].logprobs async for chunk in stream]
    whole = reply.choices[0].logprobs
    assert whole is not None
    assert whole.tokens == ["A", "ño", " 1"]
    assert whole.token_logprobs == [-0.5] * 3
    assert whole.top_logprobs == [{"?": -1.0, token: -0.5} for token in whole.tokens]
    assert whole.text_offset == [0, 1, 3]
    assert [x.text_offset for x in chunks if x] == [[0, 1], [3]]
    assert [x.tokens for x in chunks if x] == [["A", "ño"], [" 1"]]


@pytest.mark.parametrize(
    ("chosen", "logprob", "expected"),
    [
        (b"", -0.5, {"": -0.5, "a": -1.0}),
        (b"a", -1.0, {"": -0.5, "a": -1.0}),
        (b"", -8.0, {"": -8.0, "a": -1.0}),
    ],
)
async def test_of_tokens_that_look_the_same_the_chosen_or_the_likeliest_is_shown(
    server: HttpServer,
    contract: ScriptedContract,
    chosen: bytes,
    logprob: float,
    expected: dict[str, float],
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        columns = pb.Logprobs(
            chosen=[logprob],
            chosen_bytes=[chosen],
            top=[-0.5, -1.0, -8.0],
            top_bytes=[b"", b"a", b""],
            top_token_ids=[1, 2, 3],
        )
        yield delta("", logprobs=columns)
        yield finished()
        yield usage()

    contract.script = play
    reply = await server.post("/v1/completions", {"prompt": "a", "logprobs": 3})
    assert reply.json()["choices"][0]["logprobs"]["top_logprobs"] == [expected]


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_echo_begins_with_the_prompts_tokens(
    server: HttpServer, contract: ScriptedContract, max_tokens: int
) -> None:
    """As the harness for evaluating language models asks for log-likelihoods."""

    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        params = request.sampling_params
        assert (params.prompt_logprobs, params.logprobs, params.max_tokens) == (1, 1, max_tokens)
        yield started(request)
        yield pb.GenerateStreamResponse(prompt_logprobs=scores("B"))
        yield pb.GenerateStreamResponse(prompt_logprobs=scores("C"))
        if max_tokens:
            yield delta(" d", token_ids=[4], logprobs=scores(" d"))
        yield finished(reason=pb.FINISH_REASON_LENGTH)
        yield usage()

    contract.script = play
    output = [" d"] if max_tokens else []
    options: Any = {"model": "m", "max_tokens": max_tokens, "logprobs": 1, "echo": True}
    for prompt, shown in (([1, 2, 3], "ABC"), ("ABC", "ABC"), ([0, 2, 3], "BC")):
        async with server.client() as client:
            reply = await client.completions.create(prompt=prompt, **options)
            stream = await client.completions.create(prompt=prompt, stream=True, **options)
            chunks = [chunk.choices[0] async for chunk in stream]
        (choice,) = reply.choices
        assert choice.text == "".join(x.text for x in chunks) == shown + "".join(output)
        found = choice.logprobs
        first = "" if prompt == [0, 2, 3] else "A"
        assert found.tokens == [first, "B", "C", *output]
        assert found.token_logprobs == [None, -0.5, -0.5, *(-0.5 for _ in output)]
        assert found.top_logprobs[:2] == [None, {"?": -1.0, "B": -0.5}]
        assert found.text_offset[1:3] == [len(first), len(first) + 1]
        streamed = [token for x in chunks if x.logprobs for token in x.logprobs.tokens]
        assert streamed == found.tokens


async def test_echo_without_log_probabilities(
    server: HttpServer, contract: ScriptedContract
) -> None:
    for prompt, begins in (("a b", "a b"), ([1, 2], "AB")):
        reply = await server.post("/v1/completions", {"prompt": prompt, "echo": True})
        (choice,) = reply.json()["choices"]
        assert (choice["text"], choice["logprobs"]) == (f"{begins}Hello there.", None)
        assert not contract.requests[-1].sampling_params.HasField("prompt_logprobs")


@pytest.mark.parametrize(("skip", "begins"), [(None, "A"), (True, "A"), (False, "@A")])
async def test_echo_has_special_tokens_if_the_output_has_them(
    server: HttpServer, contract: ScriptedContract, skip: bool | None, begins: str
) -> None:
    contract.script = words("B")
    body = {"prompt": [0, 1], "echo": True, "skip_special_tokens": skip}
    reply = await server.post("/v1/completions", body)
    assert reply.json()["choices"][0]["text"] == f"{begins}B"


async def test_text_of_ids(server: HttpServer, contract: ScriptedContract) -> None:
    reply = await server.post("/detokenize", {"tokens": [1, 2]})
    assert reply.json() == {"prompt": "AB"}
    ids = (await server.post("/tokenize", {"prompt": "abc"})).json()
    assert ids == {"tokens": [1, 2, 3], "count": 3, "max_model_len": 2048}
    body = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}
    assert (await server.post("/tokenize", body)).status_code == 200
    assert contract.requests[-1].prompt.chat.messages[0].content == "hi"
    for path, bad, param in (
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}, "add_special_tokens"),
    ):
        refused = await server.post(path, bad)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_long_ids_of_several_prompts_differ_as_the_calls_ids_do(
    server: HttpServer, contract: ScriptedContract
) -> None:
    async with server.client() as client:
        for end in "xy":
            headers = {"x-request-id": "i" * 127 + end}
            await client.completions.create(model="m", prompt=["a", "b"], extra_headers=headers)
    ids = {request.request_id for request in contract.requests}
    assert len(ids) == 4
    assert max(map(len, ids)) <= 128


async def test_streams_of_several_prompts_have_one_end(
    server: HttpServer, contract: ScriptedContract
) -> None:
    async with server.client() as client:
        stream = await client.completions.create(
            model="m", prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == dict.fromkeys(range(4), "Hello there.")
    ends = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].finish_reason]
    assert sorted((end.index, end.finish_reason) for end in ends) == [(i, "stop") for i in range(4)]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
    assert contract.ended == 2


@pytest.mark.parametrize(("prompts", "kv_bytes"), [(["a"], "4096"), (["a", "b"], None)])
async def test_a_stream_begins_with_what_is_reserved_if_that_is_known(
    server: HttpServer, prompts: list[str], kv_bytes: str | None
) -> None:
    """The second of two prompts may still wait when the reply begins."""
    body = {"prompt": prompts, "stream": True}
    async with server.http.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.headers.get("x-kvmesh-kv-bytes") == kv_bytes
        await reply.aread()
