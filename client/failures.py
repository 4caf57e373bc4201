"""Failed attempts: the error that each one raises, and whether to retry."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from kvmesh.client.errors import (
    AuthenticationError,
    DeadlineExceededError,
    DuplicateRequestError,
    FieldViolation,
    GroupVerdict,
    InvalidRequestError,
    KVFormatError,
    KVMeshError,
    ModelNotFoundError,
    NeverFitsError,
    OverCapacityError,
    PermissionDeniedError,
    RequestCancelledError,
    ResumeError,
    ServerError,
    UnavailableError,
)
from kvmesh.client.options import RetryPolicy
from kvmesh.client.status import TRAILER, decode, reason_name
from kvmesh.client.transport import RpcFailure
from kvmesh.protos import pb

_ERRORS: dict[str, type[KVMeshError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "OUT_OF_RANGE": InvalidRequestError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "NOT_FOUND": ModelNotFoundError,
    "ALREADY_EXISTS": DuplicateRequestError,
    "RESOURCE_EXHAUSTED": OverCapacityError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": RequestCancelledError,
}

_PRECONDITIONS: dict[int, type[KVMeshError]] = {
    pb.ERROR_REASON_NEVER_FITS: NeverFitsError,
    pb.ERROR_REASON_QUOTA: NeverFitsError,
    pb.ERROR_REASON_KV_FORMAT: KVFormatError,
    pb.ERROR_REASON_RESUME_MISMATCH: ResumeError,
}

# gRPC's wordings for a connection that broke during a call; the status code
# alone (INTERNAL, UNKNOWN) could also mean a server fault.
_BROKEN_CONNECTION = (
    "RST_STREAM",
    "GOAWAY",
    "Stream removed",
    "Socket closed",
    "Connection reset",
    "Broken pipe",
    "Missing :status",
    "without trailers",
)

# What gRPC writes when there is no connection, and what it means. The first match counts.
_NO_CONNECTION = tuple(
    (re.compile(wording), meaning)
    for wording, meaning in (
        (r"(?:errors resolving|DNS resolution failed for) ([^:]+)", r"there is no host {}"),
        (r"Failed parsing HTTP/2", "what answers there does not speak gRPC"),
        (r"http2 header with status: (\d+)", "something else answers there, with HTTP status {}"),
        (r"(?i)handshake|certificate", "the TLS connection failed; check the certificates"),
        (r"Failed to connect to remote host: (?:connect: )?([^():]+)", "{}"),
        (r"connect failed: .*error: ([^()]+)", "no connection: {}"),
    )
)

# Why a lost server is expected to return: there was no answer, or it is being replaced.
_OUTAGES = (None, "DRAINING", "NOT_READY")


def error_of(failure: RpcFailure) -> KVMeshError:
    """The SDK's error for a failed attempt, with all details from the server."""
    found = _trailer_error(failure)
    detail = found or pb.Error()
    cls = _ERRORS.get(failure.code, ServerError)
    message = failure.details or f"the call failed with {failure.code}"
    violations = tuple(FieldViolation(v.field, v.description) for v in detail.field_violations)
    if failure.code == "FAILED_PRECONDITION":
        cls = _PRECONDITIONS.get(detail.reason, cls)
    if failure.code == "NOT_FOUND" and found is None:
        # The answer is not from the service but from a proxy without this route.
        cls = ServerError
    if failure.code == "RESOURCE_EXHAUSTED" and _too_large(failure):
        cls, message = InvalidRequestError, "prompt: larger than the server accepts; shorten it"
        violations = (FieldViolation("prompt", "larger than the server accepts; shorten it"),)
    if found is None and failure.code == "UNAVAILABLE":
        message = _plain(message)
    if found is None and failure.code in ("INTERNAL", "UNKNOWN") and lost(failure):
        cls, message = UnavailableError, f"the connection was lost ({message})"
    return cls(
        message,
        code=failure.code,
        reason=reason_name(detail.reason) if detail.reason else None,
        request_id=detail.request_id,
        violations=violations,
        retry_after_s=detail.retry_after_s if detail.HasField("retry_after_s") else None,
        needed_bytes=detail.needed_bytes if detail.HasField("needed_bytes") else None,
        available_bytes=detail.available_bytes if detail.HasField("available_bytes") else None,
        groups=tuple(
            GroupVerdict(v.group, v.needed_bytes, v.available_bytes, v.reason)
            for v in detail.groups
        ),
    )


def _plain(details: str) -> str:
    """Why there is no connection, without gRPC's addresses and nested errors."""
    for wording, meaning in _NO_CONNECTION:
        if (match := wording.search(details)) is not None:
            return meaning.format(*(group.strip().lower() for group in match.groups()))
    return details


def lost(failure: RpcFailure) -> bool:
    """Whether the call ended because the connection or the server was lost.

    CANCELLED counts: the SDK never reports its own cancellations as failures, so
    it comes from a server that shut down.
    """
    if failure.code in ("UNAVAILABLE", "CANCELLED"):
        return True
    wording = failure.details
    return failure.code in ("INTERNAL", "UNKNOWN") and any(w in wording for w in _BROKEN_CONNECTION)


@dataclass(slots=True)
class Contact:
    """Whether the server has ever answered the client. If not, its address may be wrong."""

    made: bool = False


@dataclass(slots=True)
class RetryState:
    """Whether to retry one call, and after what delay.

    rng: random numbers for the jitter
    contact: of the client, for all of its calls
    deadline: on the transport's clock, or None; no wait extends past it
    failures: failed attempts; refusals: those of them that an outage does not explain
    lost_at: when the server was lost, on that clock, later by the time for which it has answered
        since; None after the call has made progress
    """

    policy: RetryPolicy
    rng: random.Random
    contact: Contact = field(default_factory=Contact)
    deadline: float | None = None
    failures: int = 0
    refusals: int = 0
    lost_at: float | None = None

    def progress(self) -> None:
        """The call delivered something: earlier failures no longer count."""
        self.failures = self.refusals = 0
        self.lost_at = None

    def delay_s(
        self,
        failure: RpcFailure,
        error: KVMeshError,
        now: float,
        answered_at: float | None = None,
    ) -> float | None:
        """Seconds to wait before the next attempt, or None to give up.

        answered_at: when the failed attempt had its first answer, None if it had none
        """
        self.failures += 1
        if self.lost_at is not None and answered_at is not None:
            # Not forgotten: a request at which the server fails again and again has an end.
            self.lost_at += now - answered_at
        if error.reason is not None:  # it answers, if only that it is not ready
            self.contact.made = True
        if lost(failure) and self.lost_at is None:
            self.lost_at = now
        # The request of the lost attempt may still be ending on the server.
        ending = isinstance(error, DuplicateRequestError) and self.lost_at is not None
        if not (ending or lost(failure) or isinstance(error, OverCapacityError)):
            return None
        give_up_at = self.deadline
        if self.policy.max_attempts > 1 and (
            ending or (lost(failure) and error.reason in _OUTAGES)
        ):
            assert self.lost_at is not None
            give_up_at = self._end_of_patience(self.lost_at)
            if now >= give_up_at:
                return None
        else:
            self.refusals += 1
            if self.refusals >= self.policy.max_attempts:
                return None
        wait_s = self.rng.uniform(0, self._max_backoff_s(now, give_up_at))
        if error.retry_after_s is not None:
            if not 0 <= error.retry_after_s <= self.policy.max_retry_after_s:
                return None
            wait_s += error.retry_after_s
        if self.deadline is not None and now + wait_s >= self.deadline:
            return None
        return wait_s

    def _end_of_patience(self, lost_at: float) -> float:
        """When a lost server is given up, on the transport's clock."""
        if not self.contact.made:
            limit = lost_at + self.policy.max_connect_s
            return limit if self.deadline is None else min(limit, self.deadline)
        return lost_at + self.policy.max_outage_s if self.deadline is None else self.deadline

    def _max_backoff_s(self, now: float, give_up_at: float | None) -> float:
        """Grows with every failure. At the end it shrinks, so that there is a late attempt."""
        initial_s = self.policy.initial_backoff_s
        doublings = min(self.failures - 1, 1023)  # an outage may be long, and 2.0**1024 is no float
        backoff_s = min(self.policy.max_backoff_s, initial_s * 2.0**doublings)
        if give_up_at is None:
            return backoff_s
        return min(backoff_s, max(initial_s, (give_up_at - now) / 2))


def _trailer_error(failure: RpcFailure) -> pb.Error | None:
    for name, value in failure.trailers:
        if name == TRAILER and isinstance(value, bytes):
            return decode(value)
    return None


def _too_large(failure: RpcFailure) -> bool:
    return "message larger than max" in failure.details
