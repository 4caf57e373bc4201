"""What the router answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh.cluster.routing.errors import RoutingError
from kvmesh.cluster.routing.verdict import NO_VERDICTS, Verdict, Verdicts
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.sizes import PageNeed


@dataclass(frozen=True, slots=True)
class Placement:
    """A group, and the lease on it.

    engine_epoch: the incarnation of the group's engine that the lease is good for
    lease_bytes: over all ranks
    queue_s: how long the request waited
    leased_output_tokens: of each sequence, that the lease covers at first
    cached_tokens: of the prompt, that the group is thought to hold
    """

    request_id: str
    group: str
    engine_epoch: str
    lease: LeaseTerms
    lease_bytes: int
    queue_s: float
    leased_output_tokens: int
    cached_tokens: int
    verdicts: Verdicts = NO_VERDICTS


@dataclass(frozen=True, slots=True)
class Granted:
    """The request may go to `placement.group` now."""

    placement: Placement

    @property
    def request_id(self) -> str:
        return self.placement.request_id

    @property
    def verdicts(self) -> Verdicts:
        return self.placement.verdicts

    def __str__(self) -> str:
        return f"placed after {self.placement.queue_s:.3f} s in the queue"


@dataclass(frozen=True, slots=True)
class Enqueued:
    """The request waits; a later call's outcomes carry its grant or refusal.

    position: requests ahead of it
    projected_start_s: from now, or None where it is not known
    """

    request_id: str
    position: int
    projected_start_s: float | None
    verdicts: Verdicts = NO_VERDICTS

    def __str__(self) -> str:
        start_s = self.projected_start_s
        when = "" if start_s is None else f", to start in about {start_s:.1f} s"
        return f"queued after {self.position} others{when}"


@dataclass(frozen=True, slots=True)
class Refused:
    """The request will not be served; `error` says why."""

    request_id: str
    error: RoutingError
    verdicts: Verdicts = NO_VERDICTS

    def __str__(self) -> str:
        return f"refused: {self.error}"


@dataclass(frozen=True, slots=True)
class Grown:
    """A lease was extended: send its engine the new terms."""

    group: str
    lease: LeaseTerms


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The engine must end the lease's sequences, and refuse them if they come later.

    Where none has come, the engine may report the lease as ended at once.
    """

    group: str
    lease_id: str


Decision = Granted | Enqueued | Refused
Outcome = Decision | Grown | Withdrawn


@dataclass(frozen=True, slots=True)
class BudgetEstimate:
    """What would happen to a request, without placing it.

    fits_ever: some group could hold it when empty, and its tenant's quota is not too small
    fits_now: a group would take it at once
    group: where it would go now, or None
    projected_start_s: 0 if it would start at once, None where it is not known
    """

    fits_ever: bool
    fits_now: bool
    group: str | None
    projected_start_s: float | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Explained:
    """One decision about a request.

    age_s: how long ago; outcome: in words
    group: where it was placed, or empty; verdicts: of every group
    """

    age_s: float
    outcome: str
    group: str
    verdicts: tuple[Verdict, ...]

    def lines(self) -> list[str]:
        """For a log: the outcome first, then every group."""
        return [self.outcome, *(f"  {verdict}" for verdict in self.verdicts)]


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group's budget; pages of one rank, bytes over all ranks.

    sequences: of all its leases
    """

    group: str
    up: bool
    kv_format: str
    leases: int
    sequences: int
    max_sequences: int
    capacity: PageNeed
    used: PageNeed
    capacity_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """What one tenant uses. quota_bytes: the most it may have leased, or None"""

    queued: int
    running: int
    leased_bytes: int
    quota_bytes: int | None


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """The router's budget at a glance.

    ready: requests are admitted
    live_requests: that wait or hold a lease; leases: live ones; both with adopted ones
    granted_total: leases; released_total: those of them that ended, or whose group was lost
    expired_total: those that never reached their engine
    refused_total: by the error's class name
    """

    epoch: int
    ready: bool
    queue_depth: int
    queue_limit: int
    live_requests: int
    leases: int
    groups: tuple[GroupStatus, ...]
    granted_total: int
    released_total: int
    expired_total: int
    refused_total: Mapping[str, int]
