"""Reasoning, tool calls and structured output, as the SDK sends and receives them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvmesh import (
    Client,
    Delta,
    FakeAnswer,
    FakeTransport,
    FinishReason,
    InvalidRequestError,
    Message,
    ProtocolError,
    ToolCall,
    UnavailableError,
)
from kvmesh.client.stream_state import StreamState
from kvmesh.protos import pb

CALLS = (ToolCall("c0", "f", '{"x": 1}'), ToolCall("c1", "g", "{}"))
ANSWER = FakeAnswer("some text of it", "thought", CALLS)


def sent(**options: Any) -> pb.GenerateRequest:
    fake = FakeTransport()
    Client(transport=fake).chat([Message("user", "hi")], **options)
    request: pb.GenerateRequest = fake.server.requests[0]
    return request


def test_a_completion_has_reasoning_and_calls() -> None:
    done = Client(transport=FakeTransport([ANSWER])).chat([Message("user", "hi")])
    assert (done.reasoning, done.text, done.tool_calls) == ("thought", "some text of it", CALLS)
    assert done.choices[0].finish_reason is FinishReason.TOOL_CALLS


@pytest.mark.parametrize("after_tokens", range(1, 11))
def test_a_lost_stream_continues_with_what_is_missing(after_tokens: int) -> None:
    fake = FakeTransport([ANSWER])
    client = Client(transport=fake)
    fake.server.fail(UnavailableError("lost"), after_tokens=after_tokens)
    with client.chat_stream([Message("user", "hi")]) as stream:
        deltas = [event for event in stream.events() if isinstance(event, Delta)]
        done = stream.completion
    assert stream.resumes == 1
    assert (done.reasoning, done.text, done.tool_calls) == ("thought", "some text of it", CALLS)
    assert "".join(delta.reasoning for delta in deltas) == "thought"
    pieces = [call for delta in deltas for call in delta.tool_calls]
    assert [(piece.id, piece.name) for piece in pieces if piece.name] == [("c0", "f"), ("c1", "g")]
    assert "".join(piece.arguments_json for piece in pieces if piece.index == 0) == '{"x": 1}'


def test_a_cursor_has_reasoning_and_calls() -> None:
    client = Client(transport=FakeTransport([ANSWER]))
    with client.chat_stream([Message("user", "hi")]) as stream:
        for event in stream.events():
            if isinstance(event, Delta) and event.tool_calls:
                break
        cursor = stream.cursor
    done = StreamState.of_cursor(cursor)
    (resumed,) = done.request_to_send().resume.choices
    assert (resumed.reasoning_chars, list(resumed.tool_arguments_chars)) == (7, [0])
    again = StreamState.of_cursor(done.cursor)
    assert again.request_to_send() == done.request_to_send()


def test_a_call_that_continues_without_a_start_violates_the_contract() -> None:
    state = StreamState(pb.GenerateRequest(request_id="r"))
    state.feed(pb.GenerateStreamResponse(started=pb.Started(request_id="r")))
    piece = pb.ToolCallDelta(index=1, arguments_json="{")
    with pytest.raises(ProtocolError, match="call 1 continues"):
        state.feed(pb.GenerateStreamResponse(delta=pb.Delta(tool_calls=[piece])))


def test_calls_can_be_sent_back() -> None:
    fake = FakeTransport()
    Client(transport=fake).chat([Message("assistant", tool_calls=CALLS)])
    call = fake.server.requests[0].prompt.chat.messages[0].tool_calls[0]
    assert (call.id, call.name, call.arguments_json) == ("c0", "f", '{"x": 1}')


def test_calls_that_are_no_list_are_refused() -> None:
    client = Client(transport=FakeTransport())
    for calls in (5, "f", {"name": "f"}):
        with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.tool_calls: must be a list"):
            client.chat([{"role": "assistant", "tool_calls": calls}])


def test_what_a_tool_leaves_open_may_be_none() -> None:
    tool = {"name": "f", "description": None, "parameters": None}
    (added,) = sent(tools=[tool]).prompt.chat.tools
    assert (added.name, added.description, added.parameters_json) == ("f", "", "{}")


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ({"json_schema": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"json_schema": '{"type":"object"}'}, "json_schema", '{"type":"object"}'),
        ({"json_schema": True}, "json_schema", "true"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"grammar": "start: A"}, "grammar", "start: A"),
        ({"json_object": True}, "json_object", True),
        ({"choice": ["a", "b"]}, "choice", pb.OutputChoices(values=["a", "b"])),
    ],
)
def test_structured_output_is_sent(given: dict[str, Any], kind: str, value: Any) -> None:
    message = sent(structured_output=given).structured_output
    assert (message.WhichOneof("kind"), getattr(message, kind)) == (kind, value)


def test_tool_choice_is_sent_in_openais_form_too() -> None:
    assert sent(tool_choice="required").prompt.chat.tool_choice.mode == pb.ToolChoice.MODE_REQUIRED
    choice = {"type": "function", "function": {"name": "f"}}
    assert sent(tool_choice=choice).prompt.chat.tool_choice.name == "f"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"structured_output": "a+"}, "structured_output"),
        ({"structured_output": {}}, "structured_output"),
        ({"structured_output": {"regexp": "a"}}, "structured_output"),
        ({"structured_output": {"regex": "a", "choice": ["b"]}}, "structured_output"),
        ({"structured_output": {"regex": 1}}, "structured_output.regex"),
        ({"structured_output": {"choice": "ab"}}, "structured_output.choice"),
        ({"structured_output": {"choice": [1]}}, "structured_output.choice.values"),
        ({"structured_output": {"json_schema": {"a": {1}}}}, "structured_output.json_schema"),
        ({"tool_choice": "any"}, "prompt.chat.tool_choice"),
        ({"tool_choice": {}}, "prompt.chat.tool_choice"),
        ({"tool_choice": 1}, "prompt.chat.tool_choice"),
        ({"parallel_tool_calls": "no"}, "prompt.chat.parallel_tool_calls"),
        ({"max_reasoning_tokens": "x"}, "sampling_params.max_reasoning_tokens"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sent(**options)
    assert [violation.field for violation in caught.value.violations] == [field]
    json.dumps(str(caught.value))
