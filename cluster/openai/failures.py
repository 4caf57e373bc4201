"""Errors in OpenAI's shape, from the same table as those over gRPC."""

from __future__ import annotations

import math

import msgspec

from kvmesh.cluster.ingress.error_table import reason_label
from kvmesh.v1 import kvmesh_pb2 as pb

# Codes that clients of OpenAI compare with; others are the contract's reasons.
_CODES = {
    "missing_key": "invalid_api_key",
    "wrong_key": "invalid_api_key",
    "unknown_model": "model_not_found",
    "never_fits": "context_length_exceeded",
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_RETRYABLE = {429, 503}


class KVDetails(msgspec.Struct, omit_defaults=True):
    """What kvmesh knows besides."""

    reason: str
    request_id: str = ""
    retry_after_s: float | None = None
    needed_bytes: int | None = None
    available_bytes: int | None = None
    groups: dict[str, str] = {}


class OpenAIError(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None
    kvmesh: KVDetails


class ErrorReply(msgspec.Struct):
    error: OpenAIError


def error_reply(wire: pb.Error, status: int) -> ErrorReply:
    reason = reason_label(wire)
    return ErrorReply(
        OpenAIError(
            message=wire.message,
            type=_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            param=wire.field_violations[0].field if wire.field_violations else None,
            code=_CODES.get(reason, reason),
            kvmesh=KVDetails(
                reason,
                wire.request_id,
                wire.retry_after_s if wire.HasField("retry_after_s") else None,
                wire.needed_bytes if wire.HasField("needed_bytes") else None,
                wire.available_bytes if wire.HasField("available_bytes") else None,
                {verdict.group: verdict.reason for verdict in wire.groups if verdict.group},
            ),
        )
    )


def error_headers(wire: pb.Error, status: int) -> dict[str, str]:
    """When to try again; whether to, for clients that otherwise would."""
    headers = {}
    if wire.HasField("retry_after_s"):
        headers["retry-after"] = str(max(math.ceil(wire.retry_after_s), 1))
        headers["retry-after-ms"] = str(max(round(wire.retry_after_s * 1000), 1))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status not in _RETRYABLE:
        headers["x-should-retry"] = "false"
    return headers
