"""Responses: their items, and streams that the official client puts together."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel

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


async def test_a_conversation_becomes_a_chat(
    server: HttpServer, contract: ScriptedContract
) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    async with server.client() as client:
        await client.responses.create(
            model="tiny",
            instructions="be brief",
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "rain?"}]},
                {"type": "reasoning", "id": "r", "summary": []},
                {"role": "assistant", "content": "let me see"},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "yes"},
                {"role": "developer", "content": "now"},
            ],
            tools=[{"type": "function", "name": "weather", "parameters": schema, "strict": True}],
            max_output_tokens=7,
            temperature=0.5,
            top_logprobs=2,
            reasoning={"effort": "low"},
            store=False,
            metadata={"a": "b"},
            extra_body={"top_k": 5, "cache_salt": "s"},
        )
    request = MessageToDict(contract.requests[0], preserving_proto_field_name=True)
    chat = request["prompt"]["chat"]
    assert chat["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "parts": [{"text": "rain?"}]},
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [
                {"id": "c1", "name": "weather", "arguments_json": "{}"},
                {"id": "c2", "name": "time", "arguments_json": "{}"},
            ],
        },
        {"role": "tool", "content": "yes", "tool_call_id": "c1", "name": "weather"},
        {"role": "system", "content": "now"},
    ]
    assert chat["tools"][0]["name"] == "weather"
    assert chat["chat_template_kwargs"] == {"reasoning_effort": "low"}
    assert request["sampling_params"] == {
        "temperature": 0.5,
        "max_tokens": 7,
        "top_k": 5,
        "logprobs": 2,
    }
    assert request["cache_salt"] == "s"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": [{"content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "web_search", "name": "x"}]}, "tools[0].type"),
        ({"foo": 1}, "foo"),
    ],
)
async def test_bad_fields_are_named(
    server: HttpServer, contract: ScriptedContract, fields: dict[str, Any], param: str
) -> None:
    reply = await server.post("/v1/responses", {"input": "hi", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert not contract.requests


async def test_errors_of_the_contract_have_openais_names(
    server: HttpServer, contract: ScriptedContract
) -> None:
    refused: list[Any] = []
    contract.script = lambda request: refused
    for field, param in (
        ("sampling_params.max_tokens", "max_output_tokens"),
        ("prompt.chat.messages[1].content", "input"),
        ("prompt.chat.tools[0].parameters_json", "tools[0].parameters"),
    ):
        refused[:] = [InvalidFieldError(field, "is wrong")]
        reply = await server.post("/v1/responses", {"input": "hi"})
        assert reply.json()["error"]["param"] == param


async def test_a_response(server: HttpServer, contract: ScriptedContract) -> None:
    async with server.client() as client:
        response = await client.responses.create(model="tiny", input="hi", instructions="be nice")
    assert response.output_text == "Hello there."
    assert response.id == f"resp_{contract.requests[0].request_id}"
    assert (response.status, response.model, response.instructions) == (
        "completed",
        "tiny",
        "be nice",
    )
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (5, 2)
    assert response.usage.input_tokens_details.cached_tokens == 3


async def test_a_stream_is_what_the_client_puts_together(server: HttpServer) -> None:
    async with (
        server.client() as client,
        client.responses.stream(model="tiny", input="hi") as stream,
    ):
        events = [event async for event in stream]
        response = await stream.get_final_response()
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    assert response.output_text == "Hello there."
    assert response.status == "completed" and response.usage is not None


@pytest.mark.parametrize("reason", [pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_DEADLINE])
@pytest.mark.parametrize("text", ["", "One"])
async def test_a_response_that_is_cut_off(
    server: HttpServer, contract: ScriptedContract, text: str, reason: pb.FinishReason.ValueType
) -> None:
    ends = finished(reason=reason)
    contract.script = lambda request: [started(request), delta(text), ends, usage()]
    async with server.client() as client:
        whole = await client.responses.create(model="tiny", input="hi")
        stream = await client.responses.create(model="tiny", input="hi", stream=True)
        last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert (response.status, response.output_text) == ("incomplete", text)
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"


async def test_a_stream_that_fails(server: HttpServer, contract: ScriptedContract) -> None:
    contract.script = lambda request: [started(request), delta("One"), RuntimeError("secret")]
    async with server.client() as client:
        stream = await client.responses.create(model="tiny", input="hi", stream=True)
        with pytest.raises(openai.APIError, match="internal error"):
            async for _ in stream:
                pass


def thoughtful(request: pb.GenerateRequest) -> list[Any]:
    """Reasoning, text, and two calls."""

    def call(index: int, arguments: str, name: str = "") -> Any:
        first = {"id": f"c{index}", "name": name} if name else {}
        part = pb.ToolCallDelta(index=index, arguments_json=arguments, **first)
        return delta("", tool_calls=[part])

    return [
        started(request),
        delta("", reasoning="Hm"),
        delta("Let me", reasoning="m. "),
        delta(" see."),
        call(0, "", "weather"),
        call(0, '{"city":'),
        call(0, '"Rome"}'),
        call(1, "{}", "time"),
        finished(reason=pb.FINISH_REASON_TOOL_CALLS),
        usage(),
    ]


async def test_reasoning_and_calls_are_items(
    server: HttpServer, contract: ScriptedContract
) -> None:
    contract.script = thoughtful
    async with server.client() as client:
        whole = await client.responses.create(model="tiny", input="hi", tool_choice="required")
        async with client.responses.stream(model="tiny", input="hi") as stream:
            events = [event async for event in stream]
            streamed = await stream.get_final_response()
    assert contract.requests[0].prompt.chat.tool_choice.mode == pb.ToolChoice.MODE_REQUIRED
    for response in (whole, streamed):
        assert response.usage.output_tokens_details.reasoning_tokens == 3
        thought, message, *calls = response.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "Hmm. ")
        assert message.content[0].text == response.output_text == "Let me see."
        assert [(call.call_id, call.name, call.arguments) for call in calls] == [
            ("c0", "weather", '{"city":"Rome"}'),
            ("c1", "time", "{}"),
        ]
        assert {item.status for item in response.output} == {"completed"}
    opened = [event.item.type for event in events if event.type == "response.output_item.added"]
    closed = [event.item for event in events if event.type == "response.output_item.done"]
    assert {item.status for item in closed} == {"completed"}
    closed_types = [item.type for item in closed]
    assert opened == closed_types == ["reasoning", "message", "function_call", "function_call"]
    parts = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(part.delta for part in parts) == '{"city":"Rome"}{}'
    indexes = [event.output_index for event in events if hasattr(event, "output_index")]
    assert indexes == sorted(indexes) and set(indexes) == {0, 1, 2, 3}


def token(text: str, shown: str = "", **fields: Any) -> Any:
    """One token, and what of the output it makes visible as text."""
    scores = pb.Logprobs(chosen=[-0.5], chosen_bytes=[text.encode()])
    return delta(shown, token_ids=[1], logprobs=scores, **fields)


def calls(index: int, arguments: str, **fields: str) -> list[pb.ToolCallDelta]:
    return [pb.ToolCallDelta(index=index, arguments_json=arguments, **fields)]


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        # Reasoning, text and calls, with their markers, and text after a call.
        (
            [
                token("<think>"),
                token("Hm", reasoning="Hm"),
                token("</think>"),
                token("Yes", "Yes"),
                token("<call>"),
                token("t", tool_calls=calls(0, "", id="c0", name="time")),
                token("{}", tool_calls=calls(0, "{}")),
                token("</call>"),
                token("Now", "Now"),
                token("<end>"),
            ],
            ["reasoning", ["Yes"], "function_call", ["Now", "<end>"]],
        ),
        # Text that is held back for a while.
        ([token("o"), token("n", "on"), token("e"), token("s", "es")], [["o", "n", "e", "s"]]),
        ([token("<end>")], [["<end>"]]),
        (
            [token("<think>"), token("Hm", reasoning="Hm"), token("</think>"), token("<end>")],
            ["reasoning"],
        ),
        # Reasoning that begins again.
        (
            [token("A", reasoning="A"), token("b", "b"), token("C", reasoning="C")],
            ["reasoning", ["b"], "reasoning"],
        ),
    ],
)
async def test_a_message_has_the_tokens_of_its_text_whole_and_streamed(
    server: HttpServer, contract: ScriptedContract, deltas: list[Any], expected: list[Any]
) -> None:
    contract.script = lambda request: [started(request), *deltas, finished(), usage()]
    asked: dict[str, Any] = {"model": "tiny", "input": "hi", "top_logprobs": 0}
    async with server.client() as client:
        whole = await client.responses.create(**asked)
        stream = await client.responses.create(**asked, stream=True)
        events = [event async for event in stream]
    streamed = events[-1].response
    found = [
        [x.token for x in item.content[0].logprobs] if item.type == "message" else item.type
        for item in whole.output
    ]
    assert found == expected
    for response in (whole, streamed):
        ids = [item.id for item in response.output]
        assert len(set(ids)) == len(ids)
        for item in response.output:
            item.id = item.id.replace(response.id.removeprefix("resp_"), "")
    assert streamed.output == whole.output
    parts = [e for e in events if e.type == "response.output_text.delta"]
    said = [x.token for part in parts for x in part.logprobs]
    assert said == [x for item in expected if isinstance(item, list) for x in item]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)),
        ({"type": "function", "name": "weather"}, pb.ToolChoice(name="weather")),
    ],
)
async def test_choices_of_tools(
    server: HttpServer, contract: ScriptedContract, choice: Any, expected: pb.ToolChoice
) -> None:
    reply = await server.post("/v1/responses", {"input": "hi", "tool_choice": choice})
    assert contract.requests[0].prompt.chat.tool_choice == expected
    assert reply.json()["tool_choice"] == choice


class City(BaseModel):
    name: str


async def test_an_answer_is_parsed(server: HttpServer, contract: ScriptedContract) -> None:
    contract.script = words('{"name":', '"Rome"}')
    async with server.client() as client:
        response = await client.responses.parse(model="tiny", input="hi", text_format=City)
    assert response.output_parsed == City(name="Rome")
    schema = json.loads(contract.requests[0].structured_output.json_schema)
    assert schema["properties"]["name"]["type"] == "string"


async def test_what_official_clients_make_of_a_response_is_taken_back(
    server: HttpServer, contract: ScriptedContract
) -> None:
    def play(request: pb.GenerateRequest) -> list[Any]:
        made = pb.ToolCallDelta(index=0, id="c0", name="City", arguments_json='{"name":"Bonn"}')
        return [
            started(request),
            delta("", reasoning="Hmm."),
            delta('{"name":"Rome"}'),
            delta("", tool_calls=[made]),
            finished(reason=pb.FINISH_REASON_TOOL_CALLS),
            usage(),
        ]

    contract.script = play
    tool = openai.pydantic_function_tool(City)["function"]
    options: dict[str, Any] = {"model": "m", "tools": [{"type": "function", **tool}]}
    async with server.client() as client:
        plain = await client.responses.create(input="Hi", **options)
        parsed = await client.responses.parse(input="Hi", text_format=City, **options)
        async with client.responses.stream(input="Hi", text_format=City, **options) as stream:
            streamed = await stream.get_final_response()
        for reply in (plain, parsed, streamed):
            items = reply.output
            for echo in (items, [x.model_dump() for x in items], [x.to_dict() for x in items]):
                answer = {"type": "function_call_output", "call_id": "c0", "output": "ok"}
                turns = [{"role": "user", "content": "Hi"}, *echo, answer]
                await client.responses.create(input=turns, **options)
                sent = MessageToDict(contract.requests[-1], preserving_proto_field_name=True)
                assert sent["prompt"]["chat"]["messages"][1] == {
                    "role": "assistant",
                    "parts": [{"text": '{"name":"Rome"}'}],
                    "tool_calls": [
                        {"id": "c0", "name": "City", "arguments_json": '{"name":"Bonn"}'}
                    ],
                }
