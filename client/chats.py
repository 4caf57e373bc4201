"""Converts chats to their messages on the wire, from our own types or as OpenAI's API has them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from kvmesh.client.errors import InvalidRequestError
from kvmesh.client.options import Message, Messages
from kvmesh.client.types import ToolCall
from kvmesh.protos import pb

_TOOL_CHOICES = {
    "auto": pb.ToolChoice.MODE_AUTO,
    "none": pb.ToolChoice.MODE_NONE,
    "required": pb.ToolChoice.MODE_REQUIRED,
}
_KINDS = {
    FieldDescriptor.TYPE_BOOL: "True or False",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_INT32: "a whole number from -2^31 to 2^31 - 1",
    FieldDescriptor.TYPE_INT64: "a whole number from -2^63 to 2^63 - 1",
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_UINT32: "a whole number from 0 to 2^32 - 1",
    FieldDescriptor.TYPE_UINT64: "a whole number from 0 to 2^64 - 1",
}
_MESSAGE_KEYS = frozenset(field.name for field in dataclasses.fields(Message))


def chat(messages: Messages) -> pb.Chat:
    found = pb.Chat()
    for position, message in enumerate(messages):
        _add_message(found, message, f"prompt.chat.messages[{position}]")
    return found


def set_chat_option(found: pb.Chat, name: str, value: Any) -> None:
    """Set an option that concerns chats only."""
    if name == "tools":
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise InvalidRequestError.of("tools", f"expected a list of tools, got {value!r:.60}")
        for position, tool in enumerate(value):
            _add_tool(found, tool, f"prompt.chat.tools[{position}]")
    elif name == "tool_choice":
        _set_tool_choice(found.tool_choice, value)
    else:
        assign(found, name, value, f"prompt.chat.{name}")


def _set_tool_choice(found: pb.ToolChoice, value: Any) -> None:
    path = "prompt.chat.tool_choice"
    if isinstance(value, str):
        if value not in _TOOL_CHOICES:
            expected = ", ".join(map(repr, _TOOL_CHOICES))
            raise InvalidRequestError.of(path, f"must be {expected} or a tool, got {value!r:.60}")
        found.mode = _TOOL_CHOICES[value]
        return
    name = _function(value, path).get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError.of(path, f"must have the tool's name, got {value!r:.60}")
    assign(found, "name", name, f"{path}.name")


def set_structured_output(found: pb.StructuredOutput, value: Any) -> None:
    """Set what the output must match, from a mapping with one entry."""
    path = "structured_output"
    kinds = [field.name for field in pb.StructuredOutput.DESCRIPTOR.fields]
    if not isinstance(value, Mapping) or len(value) != 1 or not value.keys() <= set(kinds):
        raise InvalidRequestError.of(
            path, f"must be a mapping with one of {', '.join(kinds)}; got {value!r:.60}"
        )
    ((kind, given),) = value.items()
    if kind == "choice":
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise InvalidRequestError.of(f"{path}.choice", f"must be texts, got {given!r:.60}")
        assign(found.choice, "values", given, f"{path}.choice.values")
        found.choice.SetInParent()
    elif kind == "json_schema":
        assign(found, kind, _json(given, f"{path}.{kind}"), f"{path}.{kind}")
    else:
        assign(found, kind, given, f"{path}.{kind}")


def _add_message(found: pb.Chat, message: Message | Mapping[str, Any], path: str) -> None:
    added = found.messages.add()
    if isinstance(message, Message):
        message = {name: getattr(message, name) for name in _MESSAGE_KEYS}
    if not isinstance(message, Mapping) or "role" not in message:
        raise InvalidRequestError.of(path, "must have a role")
    if unknown := message.keys() - _MESSAGE_KEYS:
        raise InvalidRequestError.of(
            path, f"must have no keys but {', '.join(sorted(_MESSAGE_KEYS))}; has {min(unknown)!r}"
        )
    for name, value in message.items():
        if value is None:  # as OpenAI's API has the content of a message with calls
            continue
        if name == "tool_calls":
            if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
                raise InvalidRequestError.of(
                    f"{path}.tool_calls", f"must be a list, got {value!r:.60}"
                )
            for position, call in enumerate(value):
                _add_call(added, call, f"{path}.tool_calls[{position}]")
        elif name == "content" and isinstance(value, Sequence) and not isinstance(value, str):
            for position, part in enumerate(value):
                _add_part(added, part, f"{path}.parts[{position}]")
        else:
            assign(added, name, value, f"{path}.{name}")


def _add_part(message: pb.ChatMessage, part: Any, path: str) -> None:
    if not isinstance(part, Mapping) or set(part) - {"type"} != {"text"}:
        raise InvalidRequestError.of(path, "must have text; other kinds are not supported yet")
    assign(message.parts.add(), "text", part["text"], f"{path}.text")


def _add_call(message: pb.ChatMessage, call: Any, path: str) -> None:
    if isinstance(call, ToolCall):
        call = {"id": call.id, "name": call.name, "arguments": call.arguments_json}
    function = _function(call, path)
    added = message.tool_calls.add()
    assign(added, "id", call.get("id", ""), f"{path}.id")
    assign(added, "name", function.get("name", ""), f"{path}.name")
    arguments = function.get("arguments", {})
    assign(added, "arguments_json", _json(arguments, path), f"{path}.arguments")


def _add_tool(found: pb.Chat, tool: Any, path: str) -> None:
    given = {name: value for name, value in _function(tool, path).items() if value is not None}
    added = found.tools.add()
    for name in ("name", "description"):
        assign(added, name, given.get(name, ""), f"{path}.{name}")
    parameters = given.get("parameters", {})
    assign(added, "parameters_json", _json(parameters, path), f"{path}.parameters")


def _function(value: Any, path: str) -> Mapping[str, Any]:
    """What OpenAI's API wraps as {"type": "function", "function": ...}."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequestError.of(path, "must be a mapping")
    return function


def _json(value: Any, path: str) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.of(path, f"cannot be sent as JSON: {error}") from error


def assign(message: Any, name: str, value: object, path: str) -> None:
    """Set one field; a value that its type cannot hold raises an error naming `path`."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if isinstance(value, bool) and field.type not in (field.TYPE_BOOL, field.TYPE_MESSAGE):
        raise _misfit(field, value, path)
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, Sized) and not isinstance(value, str | bytes):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, OverflowError, AttributeError):
        raise _misfit(field, value, path) from None


def _misfit(field: FieldDescriptor, value: object, path: str) -> InvalidRequestError:
    """Without protobuf's words, which name neither the argument nor what it may be."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, item = (_one(part) for part in field.message_type.fields)
        expected = f"a mapping, from {key} to {item}"
    elif field.is_repeated:
        expected = f"a list, each item {_one(field)}"
    else:
        expected = _one(field)
    return InvalidRequestError.of(path, f"expected {expected}; got {value!r:.60}")


def _one(field: FieldDescriptor) -> str:
    """What a single value of a field may be."""
    if field.message_type is not None:
        return "a mapping with text as keys, and values of JSON"
    return _KINDS.get(field.type, "another type")
