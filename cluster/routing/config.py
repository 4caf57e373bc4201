"""The router's settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How the router waits, forgets and starts.

    queue_limit: requests that may wait at once
    lease_ttl_s: an unused lease lives this long
    grace_s: how long a lease may be missing from an engine's report after its grant
    rebuild_timeout_s: after its start, the router waits this long for the known
        groups' first reports before it admits to those that have reported
    retry_least_s, retry_most_s: bounds of the advice when to come back
    """

    queue_limit: int = 1024
    lease_ttl_s: float = 30.0
    grace_s: float = 5.0
    rebuild_timeout_s: float = 30.0
    retry_least_s: float = 0.25
    retry_most_s: float = 60.0

    def __post_init__(self) -> None:
        if self.queue_limit < 0:
            raise ValueError(f"queue_limit must be at least 0, got {self.queue_limit}")
        for name in ("lease_ttl_s", "grace_s", "rebuild_timeout_s", "retry_least_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.grace_s > self.lease_ttl_s:
            raise ValueError(f"grace_s must be at most lease_ttl_s, got {self.grace_s}")
        if self.retry_most_s < self.retry_least_s:
            raise ValueError(
                f"retry_most_s must be at least retry_least_s, got {self.retry_most_s}"
            )
