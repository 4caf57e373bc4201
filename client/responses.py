"""Converts reply messages to typed results."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message as ProtoMessage

from kvmesh.client.errors import ProtocolError
from kvmesh.client.types import (
    Choice,
    Completion,
    FinishReason,
    TokenLogprob,
    TokenLogprobs,
    ToolCall,
    Usage,
)
from kvmesh.protos import pb

T = TypeVar("T")

_FINISH_REASONS: dict[pb.FinishReason.ValueType, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
    pb.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}


def mirror(cls: type[T], message: ProtoMessage) -> T:
    """A message as a dataclass that has the same field names.

    Unset optional fields become None, repeated fields become tuples, maps become
    dicts, and messages become the dataclass in the field's annotation.
    """
    values = {
        name: _value(message, name, optional, element)
        for name, optional, element in _plan(typing.cast(Hashable, cls))
    }
    return cls(**values)


def _value(message: ProtoMessage, name: str, optional: bool, element: type | None) -> Any:
    value = getattr(message, name)
    if optional:
        return value if message.HasField(name) else None
    if isinstance(value, ProtoMessage):
        return mirror(typing.cast(type, element), value)
    if isinstance(value, str | bytes | int | float):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(mirror(element, item) if element else item for item in value)


@functools.cache
def _plan(cls: Hashable) -> tuple[tuple[str, bool, type | None], ...]:
    """For each field: its name, whether it may be None, and its dataclass if it has one."""
    assert isinstance(cls, type)
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    plan = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = (hint, *typing.get_args(hint))
        element = next((part for part in inner if dataclasses.is_dataclass(part)), None)
        plan.append((field.name, type(None) in inner, typing.cast("type | None", element)))
    return tuple(plan)


def completion(reply: pb.GenerateResponse) -> Completion:
    if not reply.choices:
        raise ProtocolError("the server's reply has no choices", request_id=reply.request_id)
    return Completion(
        request_id=reply.request_id,
        model=reply.model,
        seed=reply.seed,
        choices=tuple(
            Choice(
                index=choice.index,
                text=choice.text,
                token_ids=tuple(choice.token_ids),
                finish_reason=finish_reason(choice.finish_reason),
                finish_reason_number=choice.finish_reason,
                matched_stop=matched_stop(choice),
                logprobs=logprobs(choice.token_ids, choice.logprobs),
                reasoning=choice.reasoning,
                tool_calls=tuple(mirror(ToolCall, call) for call in choice.tool_calls),
            )
            for choice in reply.choices
        ),
        usage=mirror(Usage, reply.usage),
        prompt_logprobs=prompt_logprobs(reply.prompt_logprobs),
    )


def finish_reason(value: pb.FinishReason.ValueType) -> FinishReason:
    return _FINISH_REASONS.get(value, FinishReason.OTHER)


def matched_stop(message: pb.Choice | pb.ChoiceFinished) -> str | int | None:
    match message.WhichOneof("matched_stop"):
        case "matched_stop_string":
            return message.matched_stop_string
        case "matched_stop_token_id":
            return message.matched_stop_token_id
        case _:
            return None


def logprobs(token_ids: Sequence[int], columns: pb.Logprobs) -> tuple[TokenLogprobs, ...]:
    """The columns as one entry for each token; none if they were not requested."""
    chosen = map(_token_logprob, token_ids, columns.chosen_bytes, columns.chosen)
    top = tuple(map(_token_logprob, columns.top_token_ids, columns.top_bytes, columns.top))
    k = len(top) // len(columns.chosen) if columns.chosen else 0
    return tuple(
        TokenLogprobs(entry, top[k * index : k * (index + 1)]) for index, entry in enumerate(chosen)
    )


def prompt_logprobs(columns: pb.Logprobs) -> tuple[TokenLogprobs, ...]:
    """Of a prompt's tokens."""
    return logprobs(columns.chosen_token_ids, columns)


def _token_logprob(token_id: int, token: bytes, logprob: float) -> TokenLogprob:
    return TokenLogprob(token_id, token.decode(errors="replace"), logprob, tuple(token))
