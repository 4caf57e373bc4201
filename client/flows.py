"""How a call is made, retried and resumed, as generators that do no I/O.

A flow yields the step to execute and is sent its outcome; a failed attempt is
thrown into it as RpcFailure. The synchronous and the asynchronous client differ
only in the few lines that execute these steps.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from kvmesh.client.checks import Metadata
from kvmesh.client.errors import DeadlineExceededError
from kvmesh.client.failures import RetryState, error_of
from kvmesh.client.stream_state import StreamState
from kvmesh.client.transport import Method, Reply, Request, RpcFailure
from kvmesh.client.types import Delta, PromptLogprobs, StreamEvent
from kvmesh.protos import pb

# The server ends a request at its timeout and answers. The call's own deadline
# is this much later, in case the server no longer answers.
GRACE_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Now:
    """Outcome: the transport's clock, as a float."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Outcome: None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Send(Generic[Request, Reply]):
    """Make one attempt of a unary call. Outcome: the reply."""

    method: Method[Request, Reply]
    request: Request
    timeout_s: float | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Open:
    """Start the streaming call, after ending the previous one. Outcome: None."""

    request: pb.GenerateRequest
    timeout_s: float | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Read:
    """Outcome: the next event of the open call, or None at its end."""


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand an event to the caller. Outcome: None."""

    event: StreamEvent


UnaryStep: TypeAlias = Now | Sleep | Send[Any, Any]
StreamStep: TypeAlias = Now | Sleep | Open | Read | Emit
UnaryFlow: TypeAlias = Generator[UnaryStep, Any, T]
StreamFlow: TypeAlias = Generator[StreamStep, Any, None]


def unary(
    method: Method[Request, Reply],
    request: Request,
    timeout_s: float | None,
    metadata: Metadata,
    retry: RetryState,
) -> UnaryFlow[Reply]:
    """One unary call, retried when that can help; returns the reply."""
    start = yield Now()
    retry.deadline = None if timeout_s is None else start + timeout_s
    while True:
        remaining_s = _remaining_s(retry.deadline, (yield Now()))
        grace_s = 0.0
        if isinstance(request, pb.GenerateRequest) and remaining_s is not None:
            request.timeout_s, grace_s = remaining_s, GRACE_S
        try:
            limit_s = None if remaining_s is None else remaining_s + grace_s
            reply: Reply = yield Send(method, request, limit_s, metadata)
        except RpcFailure as failure:
            yield from _back_off(failure, retry)
        else:
            retry.contact.made = True
            return reply


def stream(
    state: StreamState, timeout_s: float | None, metadata: Metadata, retry: RetryState
) -> StreamFlow:
    """One streamed generation, resumed when its connection is lost."""
    start = yield Now()
    retry.deadline = None if timeout_s is None else start + timeout_s
    if state.continues:
        retry.lost_at = start  # the stream that it continues may not have ended on the server
    while True:
        remaining_s = _remaining_s(retry.deadline, (yield Now()))
        request = state.request_to_send()
        if remaining_s is not None:
            request.timeout_s = remaining_s
        answered_at: float | None = None
        try:
            limit_s = None if remaining_s is None else remaining_s + GRACE_S
            yield Open(request, limit_s, metadata)
            while (event := (yield Read())) is not None:
                retry.contact.made = True
                if answered_at is None:
                    answered_at = yield Now()
                if (found := state.feed(event)) is not None:
                    if isinstance(found, Delta | PromptLogprobs):
                        retry.progress()
                    yield Emit(found)
            if state.ended:
                return
            # Some proxies turn a lost server into an OK without usage.
            raise RpcFailure("UNAVAILABLE", "the stream ended early, without usage")
        except RpcFailure as failure:
            if state.ended:
                return  # usage was received: nothing is missing
            yield from _back_off(failure, retry, answered_at)


def _back_off(
    failure: RpcFailure, retry: RetryState, answered_at: float | None = None
) -> Generator[Any, Any, None]:
    """Wait before the next attempt, or raise the failure's error."""
    error = error_of(failure)
    wait_s = retry.delay_s(failure, error, (yield Now()), answered_at)
    if wait_s is None:
        raise error from None
    yield Sleep(wait_s)


def _remaining_s(deadline: float | None, now: float) -> float | None:
    if deadline is None:
        return None
    if now >= deadline:
        raise DeadlineExceededError("timeout_s expired before the call could be made")
    return deadline - now
