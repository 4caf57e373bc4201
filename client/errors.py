"""Everything the SDK raises, in one tree.

    KVMeshError
    ├── InvalidRequestError         a field is wrong; `field` names it
    ├── AuthenticationError         no API key, or a wrong one
    │   └── CredentialsError        the key's file cannot be used
    ├── PermissionDeniedError       the key may not do that
    ├── ModelNotFoundError          the model asked for is not served
    ├── DuplicateRequestError       the request_id is in use
    ├── CapacityError               KV bytes: needed_bytes, available_bytes, groups
    │   ├── NeverFitsError          no group could hold it, even empty
    │   └── OverCapacityError       not now; retry_after_s says when
    ├── ResumeError                 a stream that cannot go on where it was
    ├── DeadlineExceededError       the time ran out (also a TimeoutError)
    ├── UnavailableError            nobody there, or lost (also a ConnectionError)
    ├── RequestCancelledError       the server's side cancelled the call
    ├── ServerError                 a fault of the server's
    │   └── ProtocolError           an answer that breaks the contract
    └── ClosedError                 the client or stream has been closed

All carry the same attributes, empty where they do not apply, and survive
pickling. A bare grpc.RpcError never leaves the SDK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field, named by its path in the request."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class GroupVerdict:
    """Why one group was not chosen."""

    group: str
    needed_bytes: int
    available_bytes: int
    reason: str


class KVMeshError(Exception):
    """The root of what the SDK raises.

    message: one sentence
    code: name of the gRPC status code, or None if the error arose locally
    reason: the server's ErrorReason without its prefix, e.g. "QUEUE_FULL"
    violations: what is wrong with which field
    retry_after_s: when the server thinks that trying again may work
    needed_bytes, available_bytes: KV bytes, of the group that comes closest
    groups: why each group was not chosen
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str | None = None,
        request_id: str = "",
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        needed_bytes: int | None = None,
        available_bytes: int | None = None,
        groups: tuple[GroupVerdict, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.groups = groups

    @property
    def field(self) -> str | None:
        """The first field that is wrong, or None."""
        return self.violations[0].field if self.violations else None

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "message"}
        return _rebuild, (type(self), self.message, state)


def _rebuild(cls: type[KVMeshError], message: str, state: dict[str, Any]) -> KVMeshError:
    error = cls(message)
    vars(error).update(state)
    return error


class InvalidRequestError(KVMeshError):
    """A field is wrong; the request can never be served as it is."""

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """An error found before anything was sent."""
        return cls(f"{field}: {description}", violations=(FieldViolation(field, description),))


class AuthenticationError(KVMeshError):
    """No API key, or a wrong one."""


class CredentialsError(AuthenticationError):
    """The file with the API key cannot be used, and why."""


class PermissionDeniedError(KVMeshError):
    """The API key may not do that."""


class ModelNotFoundError(KVMeshError):
    """The model asked for is not served here."""


class DuplicateRequestError(KVMeshError):
    """A live request has the same request_id."""


class CapacityError(KVMeshError):
    """The request's KV cache does not fit."""


class NeverFitsError(CapacityError):
    """No group could hold the request, even an empty one: make it smaller."""


class OverCapacityError(CapacityError):
    """Pool, queue or quota have no room now; try again after `retry_after_s`."""


class ResumeError(KVMeshError):
    """The stream cannot go on where it was: another model is served by now."""


class DeadlineExceededError(KVMeshError, TimeoutError):
    """The time ran out before there was an answer, or would have."""


class UnavailableError(KVMeshError, ConnectionError):
    """The server cannot be reached, was lost, or is draining."""


class RequestCancelledError(KVMeshError):
    """The server's side cancelled the call."""


class ServerError(KVMeshError):
    """A fault of the server's; its log has the request_id."""


class ProtocolError(ServerError):
    """An answer that breaks the wire contract."""


class ClosedError(KVMeshError):
    """The client or stream has been closed."""
