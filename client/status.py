"""How an Error is encoded in a call's status, in both directions.

The details text is a sentence, followed by the serialised Error on the last line:

    prompt is empty
    kvmesh-error: CAMQARoP...

The wire contract (kvmesh.proto, "Errors") explains why the text carries it.
For other clients the same can be sent in google.rpc's trailer.
"""

from __future__ import annotations

import base64
import binascii
import re

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from kvmesh.protos import pb, pb_status

TRAILER = "grpc-status-details-bin"
MARK = "kvmesh-error: "
MAX_ERROR_BYTES = 2048
MAX_SENTENCE_CHARS = 300
_MAX_NAME_CHARS = 64
_GOOGLE = "type.googleapis.com/google.rpc."


def encode_details(error: pb.Error) -> str:
    """The details text of a failed call, shortened if it is too long.

    At most MAX_ERROR_BYTES are serialised: texts are cut first, then group
    verdicts are dropped, then all field violations except the first.
    """
    fitting = pb.Error()
    fitting.CopyFrom(error)
    fitting.message = fitting.message[:MAX_SENTENCE_CHARS]
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
    sentence = " ".join(fitting.message.split())
    tail = base64.b64encode(fitting.SerializeToString()).decode("ascii")
    return f"{sentence}\n{MARK}{tail}"


def decode_details(details: str) -> tuple[str, pb.Error | None]:
    """The sentence in a details text, and its Error if it carries one."""
    sentence, mark, tail = details.rpartition(MARK)
    if not mark:
        return details, None
    try:
        return sentence.rstrip("\n"), pb.Error.FromString(base64.b64decode(tail, validate=True))
    except (binascii.Error, DecodeError):
        return details, None


def encode_trailer(error: pb.Error) -> bytes:
    """The value of TRAILER for an Error: google.rpc.Status with standard details."""
    status = pb_status.RpcStatus(code=error.code, message=error.message[:MAX_SENTENCE_CHARS])
    reason = pb.ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_")
    info = pb_status.RpcErrorInfo(reason=reason, domain="kvmesh.v1")
    for name in ("needed_bytes", "available_bytes"):
        if error.HasField(name):
            info.metadata[name] = str(getattr(error, name))
    details: list[Message] = [info]
    if error.HasField("retry_after_s"):
        retry = pb_status.RpcRetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(retry)
    if error.reason == pb.ERROR_REASON_QUOTA:
        details.append(
            pb_status.RpcQuotaFailure(
                violations=[pb_status.RpcQuotaFailure.Violation(description=status.message)]
            )
        )
    if error.field_violations:
        violation = error.field_violations[0]
        details.append(
            pb_status.RpcBadRequest(
                field_violations=[
                    pb_status.RpcBadRequest.Violation(
                        field=violation.field[:_MAX_NAME_CHARS],
                        description=violation.description[: MAX_SENTENCE_CHARS // 2],
                    )
                ]
            )
        )
    for detail in details:
        name = type(detail).__name__.removeprefix("Rpc")
        status.details.append(
            Any(type_url=_GOOGLE + name, value=detail.SerializeToString(deterministic=True))
        )
    return status.SerializeToString()


def decode_trailer(value: bytes) -> pb.Error | None:
    """The Error in a TRAILER, or None if it cannot be parsed. Unknown details are skipped."""
    try:
        status = pb_status.RpcStatus.FromString(value)
        error = pb.Error(code=status.code, message=status.message)
        for detail in status.details:
            match detail.type_url.removeprefix(_GOOGLE):
                case "RetryInfo":
                    retry = pb_status.RpcRetryInfo.FromString(detail.value)
                    error.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
                case "BadRequest":
                    bad = pb_status.RpcBadRequest.FromString(detail.value)
                    for violation in bad.field_violations:
                        error.field_violations.add(
                            field=violation.field, description=violation.description
                        )
                case "ErrorInfo":
                    _read_info(pb_status.RpcErrorInfo.FromString(detail.value), error)
    except DecodeError:
        return None
    return error


def _read_info(info: pb_status.RpcErrorInfo, error: pb.Error) -> None:
    if info.domain != "kvmesh.v1":
        return
    name = f"ERROR_REASON_{info.reason}"
    if name in pb.ErrorReason.keys():  # noqa: SIM118 - not a dict
        error.reason = pb.ErrorReason.Value(name)
    for field in ("needed_bytes", "available_bytes"):
        digits = info.metadata.get(field, "")
        if re.fullmatch("[0-9]{1,18}", digits):
            setattr(error, field, int(digits))
