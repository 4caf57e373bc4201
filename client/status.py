"""How an Error is encoded in a call's status, in both directions.

The status message is the Error's sentence, and the trailer `grpc-status-details-bin` a
google.rpc.Status with the Error itself and Google's standard details, see "Errors" in
kvmesh.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from kvmesh.protos import pb

TRAILER: Final = "grpc-status-details-bin"
DOMAIN: Final = "kvmesh.v1"
MAX_ERROR_BYTES: Final = 2048
MAX_SENTENCE_CHARS: Final = 300
MAX_DURATION_S: Final = 315_576_000_000  # google.protobuf.Duration's
_MAX_NAME_CHARS: Final = 64


def fitted(error: pb.Error) -> pb.Error:
    """The Error with its message on one line, shortened to at most MAX_ERROR_BYTES.

    Texts are cut first, then group verdicts are dropped, then all field violations except the
    first.
    """
    fitting = pb.Error()
    fitting.CopyFrom(error)
    fitting.message = " ".join(fitting.message.split())[:MAX_SENTENCE_CHARS]
    fitting.request_id = fitting.request_id[:_MAX_NAME_CHARS]
    for violation in fitting.field_violations:
        violation.field = violation.field[:_MAX_NAME_CHARS]
        violation.description = violation.description[: MAX_SENTENCE_CHARS // 2]
    for verdict in fitting.groups:
        verdict.group = verdict.group[:_MAX_NAME_CHARS]
        verdict.reason = verdict.reason[: MAX_SENTENCE_CHARS // 2]
    while fitting.groups and fitting.ByteSize() > MAX_ERROR_BYTES:
        del fitting.groups[-1]
    while len(fitting.field_violations) > 1 and fitting.ByteSize() > MAX_ERROR_BYTES:
        del fitting.field_violations[-1]
    return fitting


def encode(error: pb.Error) -> tuple[str, bytes]:
    """The status message of a failed call, and its TRAILER."""
    fitting = fitted(error)
    status = Status(code=fitting.code, message=fitting.message)
    for detail in (fitting, *_standard_details(fitting)):
        status.details.add().Pack(detail, deterministic=True)
    return fitting.message, status.SerializeToString()


def decode(trailer: bytes) -> pb.Error | None:
    """The Error in a TRAILER; None if there is none, as in those of other servers."""
    try:
        status = Status.FromString(trailer)
        for detail in status.details:
            if detail.Is(pb.Error.DESCRIPTOR):
                return pb.Error.FromString(detail.value)
    except DecodeError:
        return None
    return None


def reason_name(reason: pb.ErrorReason.ValueType) -> str:
    """Without its prefix; the number of one from a newer server."""
    if reason not in pb.ErrorReason.values():
        return str(reason)
    return pb.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


def _standard_details(error: pb.Error) -> Iterator[Message]:
    info = ErrorInfo(reason=reason_name(error.reason), domain=DOMAIN)
    for name in ("needed_bytes", "available_bytes"):
        if error.HasField(name):
            info.metadata[name] = str(getattr(error, name))
    yield info
    if 0 <= error.retry_after_s <= MAX_DURATION_S and error.HasField("retry_after_s"):
        retry = RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        yield retry
    if error.reason == pb.ERROR_REASON_QUOTA:
        yield QuotaFailure(violations=[QuotaFailure.Violation(description=error.message)])
    if error.field_violations:
        yield BadRequest(
            field_violations=[
                BadRequest.FieldViolation(field=x.field, description=x.description)
                for x in error.field_violations[:1]
            ]
        )
