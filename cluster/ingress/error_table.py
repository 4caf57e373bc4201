"""The table that maps every error to its form on the wire, over gRPC and over HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import grpc

from kvmesh.cluster.errors import (
    ContextExceededError,
    DrainingError,
    EngineLostError,
    IngressBusyError,
    NotAllowedError,
    NotReadyError,
    OversizedRequestError,
    RequestDeadlineError,
    RequestFaultError,
    ResumeMismatchError,
    UnauthenticatedError,
    UnknownModelError,
    UnknownPathError,
    UnsupportedFieldError,
)
from kvmesh.cluster.routing import errors as routing
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError, PoolCapacityError, WorkerDiedError

RETRY_LOST_ENGINE_S = 1.0
RETRY_NOT_READY_S = 2.0

_S = grpc.StatusCode


class ErrorRow(NamedTuple):
    """What an error is on the wire: its code and status by protocol, and one reason."""

    kind: type[BaseException]
    code: grpc.StatusCode
    reason: pb.ErrorReason.ValueType
    http_status: int


# The first row whose class matches decides; order subclasses before their parents.
_TABLE: tuple[ErrorRow, ...] = tuple(
    ErrorRow(*row)
    for row in (
        (UnsupportedFieldError, _S.INVALID_ARGUMENT, pb.ERROR_REASON_UNSUPPORTED, 400),
        (OversizedRequestError, _S.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_FIELD, 413),
        (InvalidFieldError, _S.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_FIELD, 400),
        (UnauthenticatedError, _S.UNAUTHENTICATED, pb.ERROR_REASON_WRONG_KEY, 401),
        (NotAllowedError, _S.PERMISSION_DENIED, pb.ERROR_REASON_NOT_ALLOWED, 403),
        (routing.NoAllowedFormatError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_KV_FORMAT, 400),
        (UnknownModelError, _S.NOT_FOUND, pb.ERROR_REASON_UNKNOWN_MODEL, 404),
        (UnknownPathError, _S.UNIMPLEMENTED, pb.ERROR_REASON_UNSUPPORTED, 404),
        (routing.RequestIdInUseError, _S.ALREADY_EXISTS, pb.ERROR_REASON_DUPLICATE_REQUEST_ID, 409),
        (routing.ExceedsEveryGroupError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_NEVER_FITS, 400),
        (ContextExceededError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_NEVER_FITS, 400),
        (routing.QuotaExceededError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_QUOTA, 400),
        (ResumeMismatchError, _S.FAILED_PRECONDITION, pb.ERROR_REASON_RESUME_MISMATCH, 400),
        (routing.QueueFullError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUEUE_FULL, 429),
        (
            routing.QuotaUsedUpError,
            _S.RESOURCE_EXHAUSTED,
            pb.ERROR_REASON_OVER_CAPACITY,
            429,
        ),
        (routing.NoGroupError, _S.UNAVAILABLE, pb.ERROR_REASON_NOT_READY, 503),
        (routing.NoRoomError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OVER_CAPACITY, 429),
        (PoolCapacityError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OVER_CAPACITY, 429),
        (
            routing.DeadlineUnreachableError,
            _S.DEADLINE_EXCEEDED,
            pb.ERROR_REASON_DEADLINE_UNREACHABLE,
            504,
        ),
        (RequestDeadlineError, _S.DEADLINE_EXCEEDED, pb.ERROR_REASON_DEADLINE_EXCEEDED, 504),
        (EngineLostError, _S.UNAVAILABLE, pb.ERROR_REASON_ENGINE_LOST, 503),
        (WorkerDiedError, _S.UNAVAILABLE, pb.ERROR_REASON_ENGINE_LOST, 503),
        (IngressBusyError, _S.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUEUE_FULL, 429),
        (RequestFaultError, _S.INTERNAL, pb.ERROR_REASON_REQUEST_FAULT, 500),
        (DrainingError, _S.UNAVAILABLE, pb.ERROR_REASON_DRAINING, 503),
        (NotReadyError, _S.UNAVAILABLE, pb.ERROR_REASON_NOT_READY, 503),
    )
)
# Of errors that the table does not list: bugs of the server.
_BUG = ErrorRow(Exception, _S.INTERNAL, pb.ERROR_REASON_INTERNAL, 500)


def is_expected(error: BaseException) -> bool:
    """Whether the table lists the error; others are bugs of the server."""
    return _row_of(error) is not _BUG


def http_status(error: BaseException) -> int:
    """The status of an HTTP reply that reports the error."""
    return _row_of(_as_seen(error)).http_status


def to_wire(error: BaseException, request_id: str = "") -> pb.Error:
    """The error as clients see it. Errors that are not in the table do not reveal their cause."""
    error = _as_seen(error)
    row = _row_of(error)
    wire = pb.Error(code=row.code.value[0], reason=row.reason, request_id=request_id)
    if row is _BUG:
        wire.message = "internal error; see the server log"
    else:
        wire.message = str(error)
        _fill(wire, error)
    return wire


def count_by_reason(refused: Mapping[str, int]) -> dict[str, int]:
    """Counts by the error's class name as counts by ErrorReason name."""
    reasons: Counter[str] = Counter()
    for name, count in refused.items():
        row = next((row for row in _TABLE if row.kind.__name__ == name), _BUG)
        reasons[pb.ErrorReason.Name(row.reason)] += count
    return dict(reasons)


def status_code(wire: pb.Error) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == wire.code)


def reason_label(wire: pb.Error) -> str:
    """A label for metrics, e.g. ``queue_full``."""
    return pb.ErrorReason.Name(wire.reason).removeprefix("ERROR_REASON_").lower()


def _row_of(error: BaseException) -> ErrorRow:
    return next((row for row in _TABLE if isinstance(error, row.kind)), _BUG)


def _as_seen(error: BaseException) -> BaseException:
    """The error that clients see in place of this one."""
    if isinstance(error, PoolCapacityError) and not error.retryable:
        return routing.ExceedsEveryGroupError(
            {"": error.needed_bytes}, {"": error.available_bytes}, {"": error.message}
        )
    if isinstance(error, WorkerDiedError):
        # Its message names ranks, processes and files, which belong in the log only.
        return EngineLostError()
    return error


def _fill(wire: pb.Error, error: BaseException) -> None:
    """Fill in the details that an error has in addition to its message."""
    match error:
        case InvalidFieldError():
            wire.field_violations.add(field=error.field, description=error.message)
        case UnauthenticatedError(missing=True):
            wire.reason = pb.ERROR_REASON_MISSING_KEY
        case routing.NoAllowedFormatError():
            for group, why in error.reasons.items():
                wire.groups.add(group=group, reason=why)
        case routing.ExceedsEveryGroupError():
            _fill_never_fits(wire, error)
        case routing.QuotaExceededError():
            wire.needed_bytes = error.needed_bytes
            wire.available_bytes = error.quota_bytes
        case routing.NoRoomError():
            wire.retry_after_s = error.retry_after_s
            if error.needed_bytes is not None and error.available_bytes is not None:
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
