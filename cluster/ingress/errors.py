"""What the ingress refuses, and the one table from every error to the wire.

IngressError
├── UnauthenticatedError    no key, or a wrong one
├── UnknownModelError       the request names another model
├── ResumeMismatchError     the cursor does not belong to what is served
├── ContextExceededError    the prompt is longer than any group's context
├── RequestDeadlineError    the time ran out before the first token
├── EngineLostError         an engine died under the request
├── RequestAbortedError     Abort ended the request; no failure towards its client
├── DrainingError           the server is shutting down
└── NotReadyError           no group is up yet
"""

from __future__ import annotations

import grpc

from kvmesh.cluster.routing import errors as routing
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import CapacityError, InvalidRequestError, WorkerDiedError

RETRY_LOST_ENGINE_S = 1.0
RETRY_NOT_READY_S = 2.0


class IngressError(Exception):
    """Anything the ingress itself refuses or fails at."""


class UnauthenticatedError(IngressError):
    """The call has no API key (`missing`), or one that is not known."""

    def __init__(self, missing: bool) -> None:
        super().__init__(missing)
        self.missing = missing

    def __str__(self) -> str:
        if self.missing:
            return "an API key is required: send the metadata `authorization: Bearer <key>`"
        return "the API key is not known here"


class UnknownModelError(IngressError):
    """The request names a model that is not served."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(asked, served)
        self.asked = asked
        self.served = served

    def __str__(self) -> str:
        return f"model {self.asked!r} is not served here; {self.served!r} is"


class ResumeMismatchError(IngressError):
    """The resume cursor does not belong to what is served."""


class ContextExceededError(IngressError):
    """The prompt is longer than the context of every group."""

    def __init__(self, prompt_tokens: int, max_model_len: int, needed: int, available: int) -> None:
        super().__init__(prompt_tokens, max_model_len, needed, available)
        self.prompt_tokens = prompt_tokens
        self.max_model_len = max_model_len
        self.needed_bytes = needed
        self.available_bytes = available

    def __str__(self) -> str:
        return (
            f"the prompt has {self.prompt_tokens} tokens and the context holds "
            f"{self.max_model_len}, of which one must be output; it would need "
            f"{self.needed_bytes} B of KV cache, and a group has {self.available_bytes} B"
        )


class RequestDeadlineError(IngressError):
    """The request's time ran out before its first token."""

    def __str__(self) -> str:
        return "the request's time ran out before its first token"


class EngineLostError(IngressError):
    """The engine died, or was replaced, under the request."""

    def __str__(self) -> str:
        return "the engine that served the request was lost"


class RequestAbortedError(IngressError):
    """Abort ended the request while it waited for pages."""

    def __str__(self) -> str:
        return "the request was aborted"


class DrainingError(IngressError):
    """The server is shutting down."""

    def __str__(self) -> str:
        return "the server is shutting down"


class NotReadyError(IngressError):
    """No group is up yet."""

    def __str__(self) -> str:
        return "no engine is ready yet"


_S = grpc.StatusCode

# The first row whose class matches decides; order subclasses before their parents.
_TABLE: tuple[tuple[type[BaseException], grpc.StatusCode, pb.ErrorReason.ValueType], ...] = (
    (InvalidRequestError, _S.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_FIELD),
    (UnauthenticatedError, _S.UNAUTHENTICATED, pb.ERROR_REASON_WRONG_KEY),
    (UnknownModelError, _S.NOT_FOUND, pb.ERROR_REASON_UNKNOWN_MODEL),
    (routing.DuplicateRequestError, _S.ALREADY_EXISTS, pb.ERROR_REASON_DUPLICATE_REQUEST_ID),
    (routing.NeverFitsError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_NEVER_FITS),
    (ContextExceededError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_NEVER_FITS),
    (ResumeMismatchError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_RESUME_MISMATCH),
    (routing.QueueFullError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUEUE_FULL),
    (routing.QuotaExceededError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUOTA),
    (routing.NoGroupError, _S.UNAVAILABLE, pb.ERROR_REASON_NOT_READY),
    (routing.OverCapacityError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OVER_CAPACITY),
    (CapacityError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OVER_CAPACITY),
    (
        routing.DeadlineUnreachableError,
        _S.DEADLINE_EXCEEDED,
        pb.ERROR_REASON_DEADLINE_UNREACHABLE,
    ),
    (RequestDeadlineError, _S.DEADLINE_EXCEEDED, pb.ERROR_REASON_DEADLINE_EXCEEDED),
    (EngineLostError, _S.UNAVAILABLE, pb.ERROR_REASON_ENGINE_LOST),
    (WorkerDiedError, _S.UNAVAILABLE, pb.ERROR_REASON_ENGINE_LOST),
    (DrainingError, _S.UNAVAILABLE, pb.ERROR_REASON_DRAINING),
    (NotReadyError, _S.UNAVAILABLE, pb.ERROR_REASON_NOT_READY),
)


def is_expected(error: BaseException) -> bool:
    """Whether the table knows the error; others are faults of the server's."""
    return any(isinstance(error, row[0]) for row in _TABLE)


def to_wire(error: BaseException, request_id: str = "") -> pb.Error:
    """The error as clients see it; what the table does not know says nothing of its cause."""
    if isinstance(error, CapacityError) and not error.ever:
        error = routing.NeverFitsError(
            {"": error.needed_bytes}, {"": error.available_bytes}, {"": error.message}
        )
    if isinstance(error, WorkerDiedError):
        # Its sentence tells of ranks, processes and files: for the log, not for clients.
        error = EngineLostError()
    for kind, code, reason in _TABLE:
        if isinstance(error, kind):
            wire = pb.Error(
                code=code.value[0], reason=reason, message=str(error), request_id=request_id
            )
            _fill(wire, error)
            return wire
    return pb.Error(
        code=_S.INTERNAL.value[0],
        reason=pb.ERROR_REASON_INTERNAL,
        message="the server failed at this request; its log knows more",
        request_id=request_id,
    )


def status_code(wire: pb.Error) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == wire.code)


def reason_label(wire: pb.Error) -> str:
    """A label for metrics, e.g. ``queue_full``."""
    return pb.ErrorReason.Name(wire.reason).removeprefix("ERROR_REASON_").lower()


def _fill(wire: pb.Error, error: BaseException) -> None:
    """What a class knows beside its sentence."""
    match error:
        case InvalidRequestError():
            wire.field_violations.add(field=error.field, description=error.message)
        case UnauthenticatedError(missing=True):
            wire.reason = pb.ERROR_REASON_MISSING_KEY
        case routing.NeverFitsError():
            _fill_never_fits(wire, error)
        case routing.OverCapacityError():
            wire.retry_after_s = error.retry_after_s
            wire.needed_bytes = error.needed_bytes
            wire.available_bytes = error.available_bytes
        case ContextExceededError():
            wire.needed_bytes = error.needed_bytes
            wire.available_bytes = error.available_bytes
        case CapacityError():
            wire.needed_bytes = error.needed_bytes
            wire.available_bytes = error.available_bytes
            wire.retry_after_s = RETRY_LOST_ENGINE_S
        case EngineLostError():
            wire.retry_after_s = RETRY_LOST_ENGINE_S
        case NotReadyError():
            wire.retry_after_s = RETRY_NOT_READY_S


def _fill_never_fits(wire: pb.Error, error: routing.NeverFitsError) -> None:
    needed, available = error.needed_bytes, error.available_bytes
    closest = min(needed, key=lambda group: needed[group] - available[group], default=None)
    if closest is not None:
        wire.needed_bytes = needed[closest]
        wire.available_bytes = available[closest]
    for group, why in error.reasons.items():
        wire.groups.add(group=group, reason=why)
