"""Chat completions: what requests become in the contract, and what its events become."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import openai
import pytest
from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel

from kvmesh.cluster.errors import (
    ContextExceededError,
    DrainingError,
    NotReadyError,
    RequestDeadlineError,
    RequestFaultError,
    UnknownModelError,
)
from kvmesh.cluster.routing.errors import (
    NoAllowedFormatError,
    NoRoomError,
    QueueFullError,
    QuotaExceededError,
    RequestIdInUseError,
)
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

HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}},
    },
}


async def sent(server: HttpServer, contract: ScriptedContract, **fields: Any) -> dict[str, Any]:
    """The request that a chat becomes, as protobuf's JSON."""
    reply = await server.post("/v1/chat/completions", {"messages": HI, **fields})
    assert reply.status_code == 200, reply.text
    return MessageToDict(contract.requests[-1], preserving_proto_field_name=True)


async def test_every_parameter_has_its_place(
    server: HttpServer, contract: ScriptedContract
) -> None:
    request = await sent(
        server,
        contract,
        model="tiny",
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=2,
        seed=-2,
        max_completion_tokens=9,
        min_tokens=3,
        stop=["a", "b"],
        stop_token_ids=[5],
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        max_reasoning_tokens=12,
        logit_bias={"7": -100},
        logprobs=True,
        top_logprobs=4,
        n=2,
        priority=3,
        timeout_s=20,
        cache_salt="s",
        allowed_kv_formats=["int8"],
        max_kv_divergence_nats=0.5,
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        stream_options=None,
        tools=None,
    )
    assert request.pop("request_id")
    chat = request["prompt"]["chat"]
    assert chat["chat_template_kwargs"] == {"enable_thinking": False, "reasoning_effort": "low"}
    params = request.pop("sampling_params")
    assert params == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "seed": str(2**64 - 2),
        "max_tokens": 9,
        "min_tokens": 3,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "max_reasoning_tokens": 12,
        "logit_bias": {"7": -100.0},
        "logprobs": 4,
        "n": 2,
    }
    del request["prompt"]
    assert request == {
        "model": "tiny",
        "priority": 3,
        "timeout_s": 20.0,
        "cache_salt": "s",
        "allowed_kv_formats": ["int8"],
        "max_kv_divergence_nats": 0.5,
    }


async def test_what_is_not_set_is_left_to_the_server(
    server: HttpServer, contract: ScriptedContract
) -> None:
    request = await sent(server, contract)
    assert set(request) == {"request_id", "prompt", "sampling_params"}
    assert request["sampling_params"] == {}
    assert (await sent(server, contract, max_tokens=4, stop="x"))["sampling_params"] == {
        "max_tokens": 4,
        "stop": ["x"],
    }


async def test_headers_have_what_clients_cannot_put_into_a_body(
    server: HttpServer, contract: ScriptedContract
) -> None:
    headers = {
        "x_kvmesh_cache_salt": "s",
        "x_kvmesh_priority": "-2",
        "x_kvmesh_timeout_s": "1.5",
        "x_kvmesh_allowed_kv_formats": "int8, exact",
        "x_kvmesh_max_kv_divergence_nats": "0.25",
    }
    body = {"messages": HI, "cache_salt": "t"}
    assert (await server.post("/v1/chat/completions", body, **headers)).status_code == 200
    request = contract.requests[-1]
    assert (request.cache_salt, request.priority, request.timeout_s) == ("t", -2, 1.5)
    assert list(request.allowed_kv_formats) == ["int8", "exact"]
    assert request.max_kv_divergence_nats == 0.25
    reply = await server.post("/v1/chat/completions", {"messages": HI}, x_kvmesh_priority="high")
    assert reply.json()["error"]["param"] == "x-kvmesh-priority"


async def test_messages_and_tools(server: HttpServer, contract: ScriptedContract) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a":1}'}}
    request = await sent(
        server,
        contract,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "bob"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            {"role": "assistant", "content": "It", "reasoning_content": "hm", "annotations": []},
        ],
        tools=[WEATHER],
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert request["prompt"]["chat"] == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "parts": [{"text": "a"}, {"text": "b"}], "name": "bob"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "c1", "name": "weather", "arguments_json": '{"a":1}'}],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            {"role": "assistant", "content": "It"},
        ],
        "tools": [
            {
                "name": "weather",
                "description": "Of a city",
                "parameters_json": '{"type":"object","properties":{"b":{"type":"string"},"a":{}}}',
            }
        ],
        "continue_final_message": True,
    }


@pytest.mark.parametrize("kind", ["text", "message", None])
async def test_a_message_may_say_that_it_is_one(
    server: HttpServer, contract: ScriptedContract, kind: str | None
) -> None:
    """lm-eval's messages have the type text, and those of responses the type message."""
    messages = [{**turn, "type": kind} for turn in HI]
    request = await sent(server, contract, messages=messages)
    assert request["prompt"]["chat"]["messages"] == HI


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": None}, "messages", "must be a list, got null"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "is required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "is required",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "'image_url' is not supported",
        ),
        ({"messages": [{"role": "user", "foo": 1}]}, "messages[0].foo", "not a field"),
        ({"messages": [{"role": "user", "type": "x"}]}, "messages[0].type", "'message' or 'text'"),
        ({"temperature": "hot"}, "temperature", 'must be a number, got "hot"'),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"n": 1.5}, "n", "must be a whole number"),
        ({"top_k": 1 << 40}, "top_k", "must fit in 32 bits"),
        ({"seed": 1 << 64}, "seed", "64 bits"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "not a valid token id"),
        ({"top_logprobs": 3}, "top_logprobs", "together with logprobs"),
        ({"stream_options": {}}, "stream_options", "together with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a field"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "together"),
        ({"functions": []}, "functions", "is not supported"),
        ({"audio": {"voice": "a"}}, "audio", "is not supported"),
        ({"modalities": ["audio"]}, "modalities", "must be"),
        ({"tools": [{"type": "x"}]}, "tools[0].type", "must be 'function'"),
        ({"best_of": 2}, "best_of", "not a field"),
    ],
)
async def test_bad_fields_are_named(
    server: HttpServer, contract: ScriptedContract, fields: dict[str, Any], param: str, message: str
) -> None:
    reply = await server.post("/v1/chat/completions", {"messages": HI, **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    assert not contract.requests


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling_params.top_p", "top_p"),
        ("sampling_params.max_tokens", "max_completion_tokens"),
        ("sampling_params.logprobs", "top_logprobs"),
        ("sampling_params.stop[1]", "stop[1]"),
        ("prompt.chat", "messages"),
        ("prompt.chat.messages[2].role", "messages[2].role"),
        ("prompt.chat.messages[2].parts[1].image", "messages[2].content[1].image"),
        (
            "prompt.chat.messages[1].tool_calls[0].arguments_json",
            "messages[1].tool_calls[0].function.arguments",
        ),
        ("prompt.chat.tools[1].parameters_json", "tools[1].function.parameters"),
        ("prompt.chat.chat_template_kwargs", "chat_template_kwargs"),
        ("cache_salt", "cache_salt"),
    ],
)
async def test_errors_of_the_contract_have_openais_names(
    server: HttpServer, contract: ScriptedContract, field: str, param: str
) -> None:
    contract.script = lambda request: [InvalidFieldError(field, "is wrong")]
    for stream in (False, True):
        body = {"messages": HI, "stream": stream}
        reply = await server.post("/v1/chat/completions", body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert reply.json()["error"]["message"] == f"{param}: is wrong"


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (UnknownModelError("a", "b"), 404, "model_not_found", openai.NotFoundError),
        (RequestIdInUseError("r"), 409, "duplicate_request_id", openai.ConflictError),
        (ContextExceededError(9, 8, 7, 6), 400, "context_length_exceeded", openai.BadRequestError),
        (QuotaExceededError(90, 50), 400, "quota", openai.BadRequestError),
        (NoAllowedFormatError({"g": "int4"}), 400, "kv_format", openai.BadRequestError),
        (NoRoomError("full", 2.5, 90, 50), 429, "over_capacity", openai.RateLimitError),
        (QueueFullError("full", 2.5, 90, 50), 429, "queue_full", openai.RateLimitError),
        (RequestDeadlineError(), 504, "deadline_exceeded", openai.InternalServerError),
        (DrainingError(), 503, "draining", openai.InternalServerError),
        (NotReadyError(), 503, "not_ready", openai.InternalServerError),
        (RequestFaultError("NaN"), 500, "request_fault", openai.InternalServerError),
        (ValueError("secret"), 500, "internal", openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_have_their_status(
    server: HttpServer,
    contract: ScriptedContract,
    error: Exception,
    status: int,
    code: str,
    kind: type[openai.APIStatusError],
    stream: bool,
) -> None:
    contract.script = lambda request: [pb.GenerateStreamResponse(queued=pb.Queued()), error]
    async with server.client() as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="m", messages=HI, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "secret" not in caught.value.message
    headers = caught.value.response.headers
    if isinstance(error, NoRoomError):
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2500")
        details: Any = caught.value.body
        assert details["kvmesh"]["needed_bytes"] == 90
    assert ("x-should-retry" in headers) == (status not in (429, 503))


async def test_official_clients_retry_what_may_succeed(
    server: HttpServer, contract: ScriptedContract
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        if len(contract.requests) < 2:
            return [QueueFullError("full", 0.001, 90, 50)]
        return words("Yes.")(request)

    contract.script = play
    async with server.client(max_retries=1) as client:
        reply = await client.chat.completions.create(model="m", messages=HI)
    assert reply.choices[0].message.content == "Yes."


async def test_a_reply(server: HttpServer, contract: ScriptedContract) -> None:
    async with server.client() as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=HI,
            n=2,
        )
    reply = raw.parse()
    assert raw.headers["x-kvmesh-kv-bytes"] == "4096"
    assert (reply.object, reply.model) == ("chat.completion", "tiny")
    assert reply.id == f"chatcmpl-{contract.requests[0].request_id}"
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert {choice.message.content for choice in reply.choices} == {"Hello there."}
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs is None
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (5, 9)
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    assert reply.usage.model_extra is not None
    assert reply.usage.model_extra["kvmesh"]["kv_used_bytes"] == 2048


async def test_an_answer_of_no_text_is_a_text(
    server: HttpServer, contract: ScriptedContract
) -> None:
    """It is null for tool calls alone."""
    contract.script = words()
    async with server.client() as client:
        reply = await client.chat.completions.create(model="tiny", messages=HI)
    assert reply.choices[0].message.content == ""


@pytest.mark.parametrize(
    ("end", "reason", "stop"),
    [
        (finished(matched_stop_string="\n"), "stop", "\n"),
        (finished(matched_stop_token_id=2), "stop", 2),
        (finished(reason=pb.FINISH_REASON_LENGTH), "length", None),
        (finished(reason=pb.FINISH_REASON_DEADLINE), "length", None),
        (finished(reason=pb.FINISH_REASON_ABORT), "stop", None),
    ],
)
async def test_why_a_choice_ended(
    server: HttpServer,
    contract: ScriptedContract,
    end: pb.GenerateStreamResponse,
    reason: str,
    stop: object,
) -> None:
    contract.script = lambda request: [started(request), delta("a"), end, usage()]
    async with server.client() as client:
        reply = await client.chat.completions.create(model="m", messages=HI)
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="m",
                messages=HI,
                stream=True,
            )
        ]
    for choice in (reply.choices[0], chunks[-1].choices[0]):
        assert choice.finish_reason == reason
        assert choice.model_extra == {"stop_reason": stop}


async def test_a_stream(server: HttpServer, contract: ScriptedContract) -> None:
    async with (
        server.client() as client,
        client.chat.completions.with_streaming_response.create(
            model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
        ) as raw,
    ):
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.headers["x-kvmesh-kv-bytes"] == "4096"
        chunks = [chunk async for chunk in await raw.parse()]
    said = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [part.content for part in said] == ["Hello", " there.", None]
    assert [part.role for part in said] == ["assistant", None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None and not chunks[-1].choices
    assert chunks[-1].usage.total_tokens == 7
    assert len({chunk.id for chunk in chunks}) == 1


async def test_each_choice_of_a_stream_begins_with_its_role(server: HttpServer) -> None:
    async with server.client() as client:
        stream = await client.chat.completions.create(model="m", messages=HI, n=2, stream=True)
        roles: dict[int, list[str | None]] = {0: [], 1: []}
        async for chunk in stream:
            roles[chunk.choices[0].index].append(chunk.choices[0].delta.role)
    assert list(roles.values()) == [["assistant", None, None]] * 2


async def test_usage_in_every_chunk(server: HttpServer) -> None:
    options = {"continuous_usage_stats": True}
    body = {"messages": HI, "stream": True, "stream_options": options}
    lines = await server.events("/v1/chat/completions", body)
    assert '"usage":{"prompt_tokens":5,"completion_tokens":1' in lines[0]
    assert '"usage":{"prompt_tokens":5,"completion_tokens":2' in lines[1]
    assert lines[-1] == "data: [DONE]" and '"kvmesh"' not in "".join(lines)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "hi"})],
)
@pytest.mark.parametrize("include", [True, False])
async def test_usage_is_null_until_the_last_chunk_if_it_is_wanted(
    server: HttpServer, path: str, body: dict[str, Any], include: bool
) -> None:
    options = {"include_usage": include}
    *chunks, last, end = await server.events(
        path, {**body, "stream": True, "stream_options": options}
    )
    assert ['"usage":null' in chunk for chunk in chunks] == [include] * len(chunks)
    assert ('"total_tokens":7' in last) == include and end == "data: [DONE]"


async def test_log_probabilities_keep_every_byte(
    server: HttpServer, contract: ScriptedContract
) -> None:
    """Of a character that three tokens have parts of."""
    euro = "€".encode()
    columns = [
        pb.Logprobs(
            chosen=[-0.5],
            chosen_bytes=[bytes([byte])],
            top=[-0.5, float("-inf")],
            top_bytes=[bytes([byte]), b"x"],
            top_token_ids=[1, 2],
        )
        for byte in euro
    ]
    texts = ["", "", "€"]

    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        for text, scores in zip(texts, columns, strict=True):
            yield delta(text, token_ids=[1], logprobs=scores)
        yield finished()
        yield usage()

    contract.script = play
    options: Any = {"model": "m", "messages": HI, "logprobs": True, "top_logprobs": 2}
    async with server.client() as client:
        reply = await client.chat.completions.create(**options)
        stream = await client.chat.completions.create(**options, stream=True)
        chunks = [chunk async for chunk in stream]
    assert reply.choices[0].logprobs is not None
    whole = reply.choices[0].logprobs.content or []
    streamed = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert whole == streamed
    assert bytes(byte for token in whole for byte in token.bytes or []) == euro
    assert [token.token for token in whole] == [f"bytes:\\x{byte:02x}" for byte in euro]
    assert [top.logprob for top in whole[0].top_logprobs] == [-0.5, -9999.0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, pb.StructuredOutput(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"b": 1, "a": 2}},
                }
            },
            pb.StructuredOutput(json_schema='{"b":1,"a":2}'),
        ),
        ({"structured_outputs": {"json": {"a": 1}}}, pb.StructuredOutput(json_schema='{"a":1}')),
        ({"structured_outputs": {"json": '{"a": 1}'}}, pb.StructuredOutput(json_schema='{"a": 1}')),
        ({"structured_outputs": {"regex": "a+"}}, pb.StructuredOutput(regex="a+")),
        ({"structured_outputs": {"grammar": "g"}}, pb.StructuredOutput(grammar="g")),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            pb.StructuredOutput(choice=pb.OutputChoices(values=["a", "b"])),
        ),
    ],
)
async def test_formats_of_answers(
    server: HttpServer,
    contract: ScriptedContract,
    fields: dict[str, Any],
    expected: pb.StructuredOutput | None,
) -> None:
    await sent(server, contract, **fields)
    request = contract.requests[-1]
    assert request.HasField("structured_output") == (expected is not None)
    assert expected is None or request.structured_output == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    ],
)
async def test_formats_and_choices_that_are_not_known(
    server: HttpServer, fields: dict[str, Any], param: str
) -> None:
    reply = await server.post("/v1/chat/completions", {"messages": HI, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_which_field_a_bad_schema_was_in(
    server: HttpServer, contract: ScriptedContract
) -> None:
    error = InvalidFieldError("structured_output.json_schema", "is wrong")
    contract.script = lambda request: [error]
    schema = {"type": "json_schema", "json_schema": {"schema": {}}}
    for fields, param in (
        ({"response_format": schema}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json"),
    ):
        reply = await server.post("/v1/chat/completions", {"messages": HI, **fields})
        assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", pb.ToolChoice(mode=pb.ToolChoice.MODE_AUTO)),
        ("none", pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)),
        ("required", pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)),
        (
            {"type": "function", "function": {"name": "weather"}},
            pb.ToolChoice(name="weather"),
        ),
    ],
)
async def test_choices_of_tools(
    server: HttpServer, contract: ScriptedContract, choice: Any, expected: pb.ToolChoice
) -> None:
    await sent(server, contract, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    chat = contract.requests[-1].prompt.chat
    assert chat.tool_choice == expected
    assert chat.HasField("parallel_tool_calls") and not chat.parallel_tool_calls


def thoughtful(request: pb.GenerateRequest) -> Iterable[Any]:
    """Reasoning, then two calls, without text."""
    yield started(request)
    yield delta("", reasoning="Hm")
    yield delta("", reasoning="m.")
    for index, name in enumerate(("weather", "time")):
        first = pb.ToolCallDelta(index=index, id=f"c{index}", name=name)
        yield delta("", tool_calls=[first])
        for piece in ("{", "}"):
            yield delta("", tool_calls=[pb.ToolCallDelta(index=index, arguments_json=piece)])
    yield finished(reason=pb.FINISH_REASON_TOOL_CALLS)
    yield usage()


async def test_reasoning_and_tool_calls(server: HttpServer, contract: ScriptedContract) -> None:
    contract.script = thoughtful
    async with server.client() as client:
        reply = await client.chat.completions.create(model="m", messages=HI, tools=[WEATHER])
        async with client.chat.completions.stream(
            model="m", messages=HI, tools=[WEATHER], stream_options={"include_usage": True}
        ) as stream:
            chunks = [
                e.chunk.choices[0] async for e in stream if e.type == "chunk" and e.chunk.choices
            ]
            streamed = await stream.get_final_completion()
    for completion in (reply, streamed):
        assert completion.usage.completion_tokens_details.reasoning_tokens == 2
        choice = completion.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.reasoning_content == "Hmm."
        assert [
            (x.id, x.function.name, x.function.arguments) for x in choice.message.tool_calls
        ] == [
            ("c0", "weather", "{}"),
            ("c1", "time", "{}"),
        ]
    parts = [part for choice in chunks for part in choice.delta.tool_calls or []]
    first, rest = ("c0", "function"), (None, None)
    assert [(part.id, part.type) for part in parts[:3]] == [first, rest, rest]
    thoughts = [getattr(choice.delta, "reasoning_content", None) for choice in chunks]
    assert [thought for thought in thoughts if thought] == ["Hm", "m."]
    assert all(choice.delta.content is None for choice in chunks)


class City(BaseModel):
    name: str


async def test_an_answer_is_parsed(server: HttpServer, contract: ScriptedContract) -> None:
    contract.script = words('{"name":', '"Rome"}')
    async with server.client() as client:
        reply = await client.chat.completions.parse(model="m", messages=HI, response_format=City)
    assert reply.choices[0].message.parsed == City(name="Rome")
    assert "name" in contract.requests[0].structured_output.json_schema


async def test_what_official_clients_make_of_a_reply_is_taken_back(
    server: HttpServer, contract: ScriptedContract
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        yield delta("", reasoning="Hmm.")
        yield delta('{"name":"Rome"}')
        call = pb.ToolCallDelta(index=0, id="c0", name="City", arguments_json='{"name":"Bonn"}')
        yield delta("", tool_calls=[call])
        yield finished(reason=pb.FINISH_REASON_TOOL_CALLS)
        yield usage()

    contract.script = play
    options: dict[str, Any] = {"model": "m", "tools": [openai.pydantic_function_tool(City)]}
    async with server.client() as client:
        plain = await client.chat.completions.create(messages=HI, **options)
        parsed = await client.chat.completions.parse(messages=HI, response_format=City, **options)
        async with client.chat.completions.stream(
            messages=HI, response_format=City, **options
        ) as stream:
            streamed = await stream.get_final_completion()
        for reply in (plain, parsed, streamed):
            message = reply.choices[0].message
            for turn in (
                message,
                message.model_dump(warnings=False),
                message.to_dict(warnings=False),
            ):
                answer = {"role": "tool", "tool_call_id": "c0", "content": "ok"}
                await client.chat.completions.create(messages=[*HI, turn, answer], **options)
                sent = MessageToDict(contract.requests[-1], preserving_proto_field_name=True)
                assert sent["prompt"]["chat"]["messages"][1] == {
                    "role": "assistant",
                    "content": '{"name":"Rome"}',
                    "tool_calls": [
                        {"id": "c0", "name": "City", "arguments_json": '{"name":"Bonn"}'}
                    ],
                }


async def test_what_other_libraries_add_to_a_reply_is_taken_back(
    server: HttpServer, contract: ScriptedContract
) -> None:
    """LiteLLM's and OpenRouter's."""
    added: dict[str, Any] = {"provider_specific_fields": {"a": 1}}
    function = {"name": "weather", "arguments": "{}", **added}
    turn = {
        "role": "assistant",
        "content": "Hm",
        "tool_calls": [{"id": "c0", "function": function, **added}],
        "reasoning_details": [],
        "thinking_blocks": None,
        "images": None,
        **added,
    }
    request = await sent(server, contract, messages=[*HI, turn])
    assert request["prompt"]["chat"]["messages"][1] == {
        "role": "assistant",
        "content": "Hm",
        "tool_calls": [{"id": "c0", "name": "weather", "arguments_json": "{}"}],
    }
