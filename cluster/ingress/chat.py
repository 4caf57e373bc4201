"""Chats on the wire as conversations for the model's template."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import Conversation

MAX_MESSAGES = 10_000
MAX_TOOLS = 1_000
MAX_JSON_DEPTH = 50


def conversation(chat: pb.Chat) -> Conversation:
    """Raises InvalidFieldError naming the field by its path in the request."""
    for field, given, limit in (
        ("messages", len(chat.messages), MAX_MESSAGES),
        ("tools", len(chat.tools), MAX_TOOLS),
    ):
        if given > limit:
            refuse(f"prompt.chat.{field}", f"must have at most {limit} entries, got {given}")
    if not chat.messages:
        refuse("prompt.chat.messages", "must not be empty")
    messages = [
        _message(message, f"prompt.chat.messages[{index}]")
        for index, message in enumerate(chat.messages)
    ]
    if not any(_has_text(message["content"]) or "tool_calls" in message for message in messages):
        refuse("prompt.chat.messages", "must have content; all messages are empty")
    if chat.chat_template and chat.chat_template_name:
        refuse("prompt.chat.chat_template_name", "must not be set together with chat_template")
    if chat.continue_final_message and not _has_text(messages[-1]["content"]):
        refuse("prompt.chat.continue_final_message", "needs a last message that has content")
    tools = [_tool(tool, f"prompt.chat.tools[{index}]") for index, tool in enumerate(chat.tools)]
    return Conversation(
        messages,
        # A model that does not see them does not call them.
        tools if chat.tool_choice.mode != pb.ToolChoice.MODE_NONE else (),
        _struct(chat.chat_template_kwargs),
        chat.continue_final_message,
        chat.chat_template,
        chat.chat_template_name,
    )


def _message(message: pb.ChatMessage, path: str) -> dict[str, Any]:
    """As chat templates expect it: with arguments of calls as values, not as JSON text."""
    if not message.role:
        refuse(f"{path}.role", "must not be empty")
    if message.content and message.parts:
        refuse(f"{path}.parts", "must not be set together with content")
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.parts:
        found["content"] = [
            {"type": "text", "text": _text(part, f"{path}.parts[{index}]")}
            for index, part in enumerate(message.parts)
        ]
    if message.tool_calls:
        found["tool_calls"] = [
            _tool_call(call, f"{path}.tool_calls[{index}]")
            for index, call in enumerate(message.tool_calls)
        ]
    for name in ("tool_call_id", "name"):
        if value := getattr(message, name):
            found[name] = value
    return found


def _has_text(content: str | list[dict[str, str]]) -> bool:
    return bool(content if isinstance(content, str) else any(part["text"] for part in content))


def _text(part: pb.ContentPart, path: str) -> str:
    match part.WhichOneof("kind"):
        case "text":
            return part.text
        case "image":
            raise UnsupportedFieldError(f"{path}.image", "is not supported by this server yet")
        case _:
            raise InvalidFieldError(path, "must have text")


def _tool_call(call: pb.ToolCall, path: str) -> dict[str, Any]:
    if not call.name:
        refuse(f"{path}.name", "must not be empty")
    arguments = _json_object(call.arguments_json or "{}", f"{path}.arguments_json")
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _tool(tool: pb.Tool, path: str) -> dict[str, Any]:
    if not tool.name:
        refuse(f"{path}.name", "must not be empty")
    parameters = _json_object(tool.parameters_json or "{}", f"{path}.parameters_json")
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _json_object(text: str, path: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(path, f"must be JSON: {error}")
    if not isinstance(found, dict):
        refuse(path, "must be a JSON object")
    if _deeper_than(found, MAX_JSON_DEPTH):
        refuse(path, f"must not be nested deeper than {MAX_JSON_DEPTH} levels")
    return found


def _deeper_than(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list):
        return False
    return depth == 0 or any(_deeper_than(item, depth - 1) for item in inner)


def _struct(struct: Struct) -> dict[str, Any]:
    return {name: _value(value) for name, value in struct.fields.items()}


def _value(value: Value) -> Any:
    """Numbers without a fraction as integers: a Struct itself has floats only."""
    match value.WhichOneof("kind"):
        case "struct_value":
            return _struct(value.struct_value)
        case "list_value":
            return [_value(item) for item in value.list_value.values]
        case "number_value" if math.isfinite(value.number_value):
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "null_value":
            return None
    raise InvalidFieldError(
        "prompt.chat.chat_template_kwargs", "must have values, and finite numbers only"
    )
