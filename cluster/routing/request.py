"""What the router is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.routing.errors import RoutingError
from kvmesh.cluster.routing.verdict import NO_VERDICTS, Verdicts
from kvmesh.workers.request import LeaseTerms


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """A request as the router sees it: sizes, not contents.

    request_id: unique among the waiting ones
    prompt_tokens: including tokens already emitted, when the request is resumed
    max_tokens: of output still to come, for each sequence
    sequences: how many share the request (n > 1); one lease covers all of them
    priority: higher goes first
    timeout_s: the request is of no use if it has not started by then
    page_hashes: chained content hashes of the prompt's full pages, in order
    min_quality: least bits per stored key or value the caller accepts
    excluded_groups: not to be chosen, e.g. after one of them refused
    resumed: lost its group while running; goes before everything of its priority
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    tenant: str = "default"
    priority: int = 0
    timeout_s: float | None = None
    page_hashes: tuple[bytes, ...] = ()
    min_quality: float | None = None
    excluded_groups: frozenset[str] = frozenset()
    resumed: bool = False
    sequences: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens", "sequences"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be greater than 0, got {self.timeout_s}")


@dataclass(frozen=True, slots=True)
class Placement:
    """A group and the lease on it.

    expires_at: router's clock; the engine must have the request by then
    queue_s: how long the request waited
    leased_output_tokens: of each sequence; `grow` the lease before it is longer
    cached_tokens: of the prompt, that the group is thought to hold
    promised_at: router's clock, when a promised start was due; None without a promise
    verdicts: what was said of every group
    """

    request_id: str
    group: str
    lease: LeaseTerms
    lease_bytes: int
    expires_at: float
    queue_s: float
    leased_output_tokens: int = 0
    cached_tokens: int = 0
    promised_at: float | None = None
    verdicts: Verdicts = NO_VERDICTS


@dataclass(frozen=True, slots=True)
class Granted:
    """The request may go to `placement.group` now."""

    placement: Placement

    @property
    def request_id(self) -> str:
        return self.placement.request_id


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; a later call's outcomes will carry its grant or refusal.

    position: requests in front of it
    projected_start_s: from submission, or None where it is not known
    """

    request_id: str
    position: int
    projected_start_s: float | None
    verdicts: Verdicts = NO_VERDICTS


@dataclass(frozen=True, slots=True)
class Refused:
    """The request will not be served; `error` says why, in the error tree's terms."""

    request_id: str
    error: RoutingError
    verdicts: Verdicts = NO_VERDICTS


@dataclass(frozen=True, slots=True)
class Growth:
    """A lease was extended: tell the engine its new terms, which it will report.

    output_tokens: of each sequence, that it covers from now on
    """

    output_tokens: int
    lease: LeaseTerms


Outcome = Granted | Refused
Decision = Granted | Queued | Refused


@dataclass(frozen=True, slots=True)
class Estimate:
    """What would happen to a request, without submitting it.

    fits_ever, fits_now: some group could hold it when empty; holds it at once
    group: where it would go now, or None
    needed_bytes: by group, over all its ranks
    projected_start_s: 0 when it would start at once, None where it is not known
    queue_depth: requests waiting at present
    """

    request_id: str
    fits_ever: bool
    fits_now: bool
    group: str | None
    needed_bytes: dict[str, int]
    projected_start_s: float | None
    queue_depth: int
    verdicts: Verdicts
