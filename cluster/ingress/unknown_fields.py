"""Fields that this server does not know: a newer client asks for something it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from kvmesh.cluster.errors import UnsupportedFieldError


def check_known(request: Message, body: bytes) -> None:
    """Raise UnsupportedFieldError if the request or a message in it has a field unknown here.

    body: what the request was parsed from
    """
    request.DiscardUnknownFields()
    if request.ByteSize() == len(body):
        return  # nothing was lost; the usual case, found at the cost of one pass
    # Or the client has not written the fields in the usual way, which is valid as well.
    for path, number in _unknown(type(request).FromString(body), ""):
        raise UnsupportedFieldError(
            path, f"has field number {number}, which this server does not know"
        )


def _unknown(message: Message, path: str) -> Iterator[tuple[str, int]]:
    """Paths of messages, and the numbers of unknown fields in them."""
    fields: Any = UnknownFieldSet(message)
    for field in fields:
        yield path or "request", field.field_number
    for field, value in message.ListFields():
        inner = f"{path}.{field.name}" if path else field.name
        for place, item in _messages(field, value):
            yield from _unknown(item, inner + place)


def _messages(field: FieldDescriptor, value: Any) -> Iterator[tuple[str, Message]]:
    """The messages that a field has, each with its place in it."""
    if field.message_type is None:
        return
    if field.message_type.GetOptions().map_entry:
        if field.message_type.fields_by_name["value"].message_type is not None:
            yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif field.is_repeated:
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    else:
        yield "", value
