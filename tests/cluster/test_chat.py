"""Chats on the wire: what the model's template is given, and what is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.ingress.chat import MAX_JSON_DEPTH, conversation
from kvmesh.protos import pb
from kvmesh.workers.errors import InvalidFieldError

HELLO = pb.ChatMessage(role="user", content="hello")


def test_messages_are_as_templates_expect_them() -> None:
    schema = {"type": "object", "properties": {"z": {"minimum": 1}, "a": {}}}
    struct = Struct()
    struct.update({"thinking": False, "budget": 5, "share": 0.5, "list": [1, "a"]})
    found = conversation(
        pb.Chat(
            messages=[
                pb.ChatMessage(
                    role="user", parts=[pb.ContentPart(text="one"), pb.ContentPart(text="two")]
                ),
                pb.ChatMessage(
                    role="assistant",
                    tool_calls=[pb.ToolCall(id="c", name="f", arguments_json='{"x": 1.5}')],
                ),
                pb.ChatMessage(role="tool", content="3", tool_call_id="c", name="f"),
            ],
            tools=[pb.Tool(name="f", description="d", parameters_json=json.dumps(schema))],
            chat_template_kwargs=struct,
        )
    )
    user, assistant, tool = found.messages
    texts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert user == {"role": "user", "content": texts}
    assert assistant["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1.5}}}
    ]
    assert tool == {"role": "tool", "content": "3", "tool_call_id": "c", "name": "f"}
    (function,) = found.tools
    assert function["function"]["parameters"] == schema
    assert list(function["function"]["parameters"]["properties"]) == ["z", "a"], "their order"
    assert found.variables == {"thinking": False, "budget": 5, "share": 0.5, "list": [1, "a"]}
    assert json.dumps(found.variables["budget"]) == "5", "an integer"
    assert not found.continue_final_message


def deep(levels: int) -> str:
    return '{"a":' * levels + "{}" + "}" * levels


def call(**fields: Any) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(**fields)])])


def tool(**fields: Any) -> pb.Chat:
    return pb.Chat(messages=[HELLO], tools=[pb.Tool(**fields)])


def variable(value: Value) -> pb.Chat:
    return pb.Chat(messages=[HELLO], chat_template_kwargs=Struct(fields={"x": value}))


CALL = "messages[0].tool_calls[0]"


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (
            pb.Chat(messages=[pb.ChatMessage(role="u", content="x", parts=[pb.ContentPart()])]),
            "messages[0].parts",
        ),
        (
            pb.Chat(messages=[pb.ChatMessage(role="u", parts=[pb.ContentPart()])]),
            "messages[0].parts[0]",
        ),
        (call(), f"{CALL}.name"),
        (call(name="f", arguments_json="{"), f"{CALL}.arguments_json"),
        (call(name="f", arguments_json="[1]"), f"{CALL}.arguments_json"),
        (call(name="f", arguments_json="[" * 100_000), f"{CALL}.arguments_json"),
        (call(name="f", arguments_json=deep(MAX_JSON_DEPTH)), f"{CALL}.arguments_json"),
        (tool(), "tools[0].name"),
        (tool(name="f", parameters_json="null"), "tools[0].parameters_json"),
        (pb.Chat(messages=[HELLO], tools=[pb.Tool(name="f")] * 1001), "tools"),
        (variable(Value()), "chat_template_kwargs"),
        (variable(Value(number_value=math.nan)), "chat_template_kwargs"),
        (
            variable(Value(list_value=ListValue(values=[Value(number_value=math.inf)]))),
            "chat_template_kwargs",
        ),
        (
            pb.Chat(
                messages=[HELLO, pb.ChatMessage(role="assistant")], continue_final_message=True
            ),
            "continue_final_message",
        ),
    ],
)
def test_what_is_wrong_is_named(chat: pb.Chat, field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        conversation(chat)
    assert caught.value.field == f"prompt.chat.{field}"


def test_images_are_not_supported_yet() -> None:
    image = pb.ContentPart(image=pb.Image(url="https://example.com/cat.png"))
    with pytest.raises(UnsupportedFieldError) as caught:
        conversation(pb.Chat(messages=[pb.ChatMessage(role="user", parts=[image])]))
    assert caught.value.field == "prompt.chat.messages[0].parts[0].image"


def test_json_as_deep_as_allowed_is_accepted() -> None:
    found = conversation(call(name="f", arguments_json=deep(MAX_JSON_DEPTH - 1)))
    assert found.messages[0]["tool_calls"]


def test_a_template_is_given_or_named() -> None:
    found = conversation(pb.Chat(messages=[HELLO], chat_template="{{ 1 }}"))
    assert (found.template, found.template_name) == ("{{ 1 }}", "")
    found = conversation(pb.Chat(messages=[HELLO], chat_template_name="rag"))
    assert (found.template, found.template_name) == ("", "rag")
    with pytest.raises(InvalidFieldError) as caught:
        conversation(pb.Chat(messages=[HELLO], chat_template="x", chat_template_name="rag"))
    assert caught.value.field == "prompt.chat.chat_template_name"


@pytest.mark.parametrize("continued", [False, True])
def test_parts_without_text_are_empty(continued: bool) -> None:
    empty = pb.ChatMessage(role="user", parts=[pb.ContentPart(text=""), pb.ContentPart(text="")])
    with pytest.raises(InvalidFieldError) as caught:
        conversation(pb.Chat(messages=[empty]))
    assert caught.value.field == "prompt.chat.messages"
    chat = pb.Chat(messages=[HELLO, empty], continue_final_message=continued)
    if continued:
        with pytest.raises(InvalidFieldError):
            conversation(chat)
    else:
        assert conversation(chat)
