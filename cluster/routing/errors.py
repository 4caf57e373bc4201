"""The router's errors, in one tree. Each one can be rebuilt from its `args`, which are plain data.

RoutingError
├── RequestIdInUseError        the id is in use by a live request
├── RequestAbortedError        the request was aborted
├── LedgerError                a transition the ledger does not allow
├── ExceedsEveryGroupError     no group could hold it, even empty
├── QuotaExceededError         the request alone exceeds its tenant's quota
├── NoAllowedFormatError       no group has a KV format that the request accepts
├── DeadlineUnreachableError   it could not start within its client's timeout
└── NoRoomError                it does not fit now; says when to come back
    ├── QuotaUsedUpError       its tenant's other requests use up the quota
    ├── QueueFullError         the queue has no place left
    └── NoGroupError           no group is known
"""

from __future__ import annotations

from collections.abc import Mapping


class RoutingError(Exception):
    """Anything the router refuses."""


class RequestIdInUseError(RoutingError):
    """A request with this id waits or runs, and is not superseded."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"request id {self.request_id!r} is already in use by a live request"


class RequestAbortedError(RoutingError):
    """The request was aborted while it waited, or its client has asked for it again."""

    def __str__(self) -> str:
        return "the request was aborted"


class LedgerError(RoutingError):
    """A transition that the ledger's rules forbid: a fault of the caller."""


class ExceedsEveryGroupError(RoutingError):
    """No group can hold the request, even when it is empty.

    needed_bytes, available_bytes: by group, over all its ranks
    reasons: by group, why it cannot
    """

    def __init__(
        self,
        needed_bytes: Mapping[str, int],
        available_bytes: Mapping[str, int],
        reasons: Mapping[str, str],
    ) -> None:
        super().__init__(dict(needed_bytes), dict(available_bytes), dict(reasons))
        self.needed_bytes = dict(needed_bytes)
        self.available_bytes = dict(available_bytes)
        self.reasons = dict(reasons)

    def __str__(self) -> str:
        parts = [
            f"{group}: needs {needed} B of KV cache, has {self.available_bytes[group]} B "
            f"({self.reasons[group]})"
            for group, needed in self.needed_bytes.items()
        ]
        return "no group can hold the request: " + "; ".join(parts)


class QuotaExceededError(RoutingError):
    """The request alone exceeds its tenant's quota, so it could not run if nothing else did."""

    def __init__(self, needed_bytes: int, quota_bytes: int) -> None:
        super().__init__(needed_bytes, quota_bytes)
        self.needed_bytes = needed_bytes
        self.quota_bytes = quota_bytes

    def __str__(self) -> str:
        return (
            f"the request alone exceeds its tenant's quota: needs {self.needed_bytes} B of KV "
            f"cache, quota_bytes is {self.quota_bytes}"
        )


class NoAllowedFormatError(RoutingError):
    """No group's KV format is acceptable. reasons: why, by group"""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(dict(reasons))
        self.reasons = dict(reasons)

    def __str__(self) -> str:
        return "no group has a KV format that the request accepts"


class DeadlineUnreachableError(RoutingError):
    """The request could not start in time; refused at once, or when its time ran out.

    projected_start_s: from its arrival, or None where it is not known
    """

    def __init__(self, timeout_s: float, projected_start_s: float | None) -> None:
        super().__init__(timeout_s, projected_start_s)
        self.timeout_s = timeout_s
        self.projected_start_s = projected_start_s

    def __str__(self) -> str:
        if self.projected_start_s is None:
            return f"the request did not start within its timeout of {self.timeout_s:.3g} s"
        return (
            f"the request would start in {self.projected_start_s:.3g} s, "
            f"after its timeout of {self.timeout_s:.3g} s"
        )


class NoRoomError(RoutingError):
    """The request does not fit now.

    retry_after_s: from now, when room is expected
    needed_bytes, available_bytes: of the group that comes closest, over all its ranks; None if no
        group is known that could hold it
    """

    def __init__(
        self,
        message: str,
        retry_after_s: float,
        needed_bytes: int | None = None,
        available_bytes: int | None = None,
    ) -> None:
        super().__init__(message, retry_after_s, needed_bytes, available_bytes)
        self.message = message
        self.retry_after_s = retry_after_s
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes

    def __str__(self) -> str:
        figures = ""
        if self.needed_bytes is not None:
            figures = (
                f": needs {self.needed_bytes} B of KV cache, {self.available_bytes} B are free"
            )
        return f"{self.message}{figures}; retry in {self.retry_after_s:.3g} s"


class QuotaUsedUpError(NoRoomError):
    """Other requests of its tenant use up the quota; more groups would not help."""


class QueueFullError(NoRoomError):
    """The queue has no place left."""


class NoGroupError(NoRoomError):
    """No group is known."""
