"""The exceptions of the SDK, in one tree.

    KVMeshError
    ├── InvalidRequestError         a field is wrong; `field` names it
    │   └── UnknownOptionError      there is no such option (also a TypeError)
    ├── AuthenticationError         the API key is missing or wrong
    │   └── CredentialsError        the key file cannot be used
    ├── PermissionDeniedError       the key does not allow this
    ├── ModelNotFoundError          the requested model is not served
    ├── DuplicateRequestError       the request_id is in use
    ├── CapacityError               KV bytes: needed_bytes, available_bytes, groups
    │   ├── NeverFitsError          no group, or its tenant's quota, could ever hold it
    │   └── OverCapacityError       no room now; retry_after_s says when to retry
    ├── KVFormatError               no group has a KV format that the request accepts; groups
    ├── ResumeError                 a lost stream cannot be resumed
    ├── DeadlineExceededError       the timeout expired (also a TimeoutError)
    ├── UnavailableError            the server is unreachable (also a ConnectionError)
    ├── RequestCancelledError       the server cancelled the call
    ├── ServerError                 a server fault
    │   └── ProtocolError           the answer violates the contract
    ├── UsageError                  the client belongs elsewhere (also a RuntimeError)
    └── ClosedError                 the client or stream is closed

All carry the same attributes, empty where they do not apply, and can be
pickled. The SDK never raises a bare grpc.RpcError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field, given by its path in the request."""

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
    """The base class of all SDK exceptions.

    message: one sentence
    code: name of the gRPC status code, or None if the error is local
    reason: the server's ErrorReason without its prefix, e.g. "QUEUE_FULL"
    violations: the fields that are wrong, and why
    retry_after_s: when a retry may succeed, according to the server
    needed_bytes, available_bytes: KV bytes, for the group that comes closest
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
        """The first invalid field, or None."""
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
    """A field is wrong; the request cannot be served as it is."""

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """An error detected before anything was sent."""
        return cls(f"{field}: {description}", violations=(FieldViolation(field, description),))


class UnknownOptionError(InvalidRequestError, TypeError):
    """An argument is not an option of this method; the message says which was perhaps meant."""


class AuthenticationError(KVMeshError):
    """The API key is missing or wrong."""


class CredentialsError(AuthenticationError):
    """The API key file cannot be used; the message says why."""


class PermissionDeniedError(KVMeshError):
    """The API key does not allow this."""


class ModelNotFoundError(KVMeshError):
    """The requested model is not served here."""


class DuplicateRequestError(KVMeshError):
    """A live request has the same request_id."""


class CapacityError(KVMeshError):
    """The request's KV cache does not fit."""


class NeverFitsError(CapacityError):
    """No group could hold the request, even when empty, or it exceeds its tenant's quota by itself
    (its reason is QUOTA): make it smaller.
    """


class OverCapacityError(CapacityError):
    """The pool or the queue has no room now; retry after `retry_after_s`."""


class KVFormatError(KVMeshError):
    """No group has a KV format that the request accepts; `groups` says why for each."""


class ResumeError(KVMeshError):
    """The stream cannot be resumed: the server now serves a different model."""


class DeadlineExceededError(KVMeshError, TimeoutError):
    """The timeout expired before there was an answer, or was certain to."""


class UnavailableError(KVMeshError, ConnectionError):
    """The server cannot be reached, was lost, or is draining."""


class RequestCancelledError(KVMeshError):
    """The server cancelled the call."""


class ServerError(KVMeshError):
    """A server fault; search the server's log for the request_id."""


class ProtocolError(ServerError):
    """The server's answer violates the wire contract."""


class UsageError(KVMeshError, RuntimeError):
    """The client belongs to another event loop, or to the process that this one forked from."""


class ClosedError(KVMeshError):
    """The client or stream is closed."""
