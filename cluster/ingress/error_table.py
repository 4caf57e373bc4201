"""The table that maps every error to its form on the wire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import grpc

from kvmesh.cluster.errors import (
    ContextExceededError,
    DrainingError,
    EngineLostError,
    IngressBusyError,
    NoAllowedFormatError,
    NotAllowedError,
    NotReadyError,
    RequestDeadlineError,
    RequestFaultError,
    ResumeMismatchError,
    UnauthenticatedError,
    UnknownModelError,
    UnsupportedFieldError,
)
from kvmesh.cluster.routing import errors as routing
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError, PoolCapacityError, WorkerDiedError

RETRY_LOST_ENGINE_S = 1.0
RETRY_NOT_READY_S = 2.0

_S = grpc.StatusCode

# The first row whose class matches decides; order subclasses before their parents.
_TABLE: tuple[tuple[type[BaseException], grpc.StatusCode, pb.ErrorReason.ValueType], ...] = (
    (UnsupportedFieldError, _S.INVALID_ARGUMENT, pb.ERROR_REASON_UNSUPPORTED),
    (InvalidFieldError, _S.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_FIELD),
    (UnauthenticatedError, _S.UNAUTHENTICATED, pb.ERROR_REASON_WRONG_KEY),
    (NotAllowedError, _S.PERMISSION_DENIED, pb.ERROR_REASON_NOT_ALLOWED),
    (NoAllowedFormatError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_KV_FORMAT),
    (UnknownModelError, _S.NOT_FOUND, pb.ERROR_REASON_UNKNOWN_MODEL),
    (routing.RequestIdInUseError, _S.ALREADY_EXISTS, pb.ERROR_REASON_DUPLICATE_REQUEST_ID),
    (routing.ExceedsEveryGroupError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_NEVER_FITS),
    (ContextExceededError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_NEVER_FITS),
    (ResumeMismatchError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_RESUME_MISMATCH),
    (routing.QueueFullError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUEUE_FULL),
    (routing.QuotaExceededError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUOTA),
    (routing.NoGroupError, _S.UNAVAILABLE, pb.ERROR_REASON_NOT_READY),
    (routing.NoRoomError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OVER_CAPACITY),
    (PoolCapacityError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OVER_CAPACITY),
    (
        routing.DeadlineUnreachableError,
        _S.DEADLINE_EXCEEDED,
        pb.ERROR_REASON_DEADLINE_UNREACHABLE,
    ),
    (RequestDeadlineError, _S.DEADLINE_EXCEEDED, pb.ERROR_REASON_DEADLINE_EXCEEDED),
    (EngineLostError, _S.UNAVAILABLE, pb.ERROR_REASON_ENGINE_LOST),
    (WorkerDiedError, _S.UNAVAILABLE, pb.ERROR_REASON_ENGINE_LOST),
    (IngressBusyError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUEUE_FULL),
    (RequestFaultError, _S.INTERNAL, pb.ERROR_REASON_REQUEST_FAULT),
    (DrainingError, _S.UNAVAILABLE, pb.ERROR_REASON_DRAINING),
    (NotReadyError, _S.UNAVAILABLE, pb.ERROR_REASON_NOT_READY),
)


def is_expected(error: BaseException) -> bool:
    """Whether the table lists the error; others are bugs of the server."""
    return any(isinstance(error, row[0]) for row in _TABLE)


def to_wire(error: BaseException, request_id: str = "") -> pb.Error:
    """The error as clients see it. Errors that are not in the table do not reveal their cause."""
    if isinstance(error, PoolCapacityError) and not error.retryable:
        error = routing.ExceedsEveryGroupError(
            {"": error.needed_bytes}, {"": error.available_bytes}, {"": error.message}
        )
    if isinstance(error, WorkerDiedError):
        # Its message names ranks, processes and files, which belong in the log only.
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
        message="internal error; see the server log",
        request_id=request_id,
    )


def count_by_reason(refused: Mapping[str, int]) -> dict[str, int]:
    """Counts by the error's class name as counts by ErrorReason name."""
    reasons: Counter[str] = Counter()
    for name, count in refused.items():
        reason = next((row[2] for row in _TABLE if row[0].__name__ == name), None)
        reasons[pb.ErrorReason.Name(reason or pb.ERROR_REASON_INTERNAL)] += count
    return dict(reasons)


def status_code(wire: pb.Error) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == wire.code)


def reason_label(wire: pb.Error) -> str:
    """A label for metrics, e.g. ``queue_full``."""
    return pb.ErrorReason.Name(wire.reason).removeprefix("ERROR_REASON_").lower()


def _fill(wire: pb.Error, error: BaseException) -> None:
    """Fill in the details that an error has in addition to its message."""
    match error:
        case InvalidFieldError():
            wire.field_violations.add(field=error.field, description=error.message)
        case UnauthenticatedError(missing=True):
            wire.reason = pb.ERROR_REASON_MISSING_KEY
        case NoAllowedFormatError():
            for group, why in error.reasons.items():
                wire.groups.add(group=group, reason=why)
        case routing.ExceedsEveryGroupError():
            _fill_never_fits(wire, error)
        case routing.NoRoomError():
            wire.retry_after_s = error.retry_after_s
            wire.needed_bytes = error.needed_bytes
            wire.available_bytes = error.available_bytes
        case ContextExceededError():
            wire.needed_bytes = error.needed_bytes
            wire.available_bytes = error.available_bytes
        case PoolCapacityError():
            wire.needed_bytes = error.needed_bytes
            wire.available_bytes = error.available_bytes
            wire.retry_after_s = RETRY_LOST_ENGINE_S
        case EngineLostError() | IngressBusyError():
            wire.retry_after_s = RETRY_LOST_ENGINE_S
        case NotReadyError():
            wire.retry_after_s = RETRY_NOT_READY_S


def _fill_never_fits(wire: pb.Error, error: routing.ExceedsEveryGroupError) -> None:
    needed, available = error.needed_bytes, error.available_bytes
    closest = min(needed, key=lambda group: needed[group] - available[group], default=None)
    if closest is not None:
        wire.needed_bytes = needed[closest]
        wire.available_bytes = available[closest]
    for group, why in error.reasons.items():
        wire.groups.add(group=group, reason=why)
