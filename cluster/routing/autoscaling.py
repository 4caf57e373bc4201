"""How many groups run, by what the ledger and the queue say; production and simulator run it.

    router ──► fleet_load ──► Autoscaler.decide ──► the groups that run from now on

A group takes minutes to start and holds whole GPUs, so both directions have hysteresis: groups are
added when requests would wait or be refused, or will soon, as many as what runs and waits needs;
and removed one by one, when the others have been enough for long.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    NoRoomError,
    QuotaUsedUpError,
    RoutingError,
)
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.live import LiveRequest
from kvmesh.cluster.routing.router import Router

SMOOTHING_S = 30.0  # of which groups compute prompts: each is sampled as busy or not
# Groups are added when those that run are this full, so that they are up before requests wait, and
# removed when the others are at most so full.
HIGH_LOAD, LOW_LOAD = 0.8, 0.6
CLEAR_S = 60.0  # prompts that wait are to be computed within this time, besides those that come
MAX_FACTOR = 2  # by which the number of groups grows at a time, since what waits is a guess


@dataclass(frozen=True, slots=True)
class AutoscalingPolicy:
    """What operators set.

    min_groups: that always run, the first ones
    wait_s: groups are added when a request that comes would wait for longer, or nearly would
    up_after_s: for at least this long
    down_after_s: a group is removed when the others have been enough for this long
    """

    min_groups: int
    wait_s: float = 5.0
    up_after_s: float = 5.0
    down_after_s: float = 300.0

    def __post_init__(self) -> None:
        if self.min_groups < 1:
            raise ValueError(f"min_groups must be at least 1, got {self.min_groups}")
        if not self.wait_s > 0:
            raise ValueError(f"wait_s must be greater than 0, got {self.wait_s}")
        for name in ("up_after_s", "down_after_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """What runs and waits, in groups.

    held: by group that takes requests, the share of it that leases hold: of pages or of sequences
    waiting_held: what the requests that wait would hold besides
    computing: groups that compute prompts at this moment
    waiting_s: what the prompts that wait take to compute
    wait_s: what a request that comes now would wait
    """

    held: Mapping[str, float] = field(default_factory=dict)
    waiting_held: float = 0.0
    computing: int = 0
    waiting_s: float = 0.0
    wait_s: float = 0.0


def fleet_load(router: Router, now: float) -> FleetLoad:
    """The router's load at this moment. O(groups + waiting requests)

    What waits for its tenant's quota does not count: no group would let it start.
    """
    leases = router.leases
    groups = [x for x in router.fleet.groups.values() if x.account is not None and not x.draining]
    corrections = [group.backlog.correction for group in groups]
    correction = sum(corrections) / max(len(corrections), 1)
    waiting = router.admission.waiting_for_room(now)
    # As fast as leases ended so far; and no request waits less than the first of them has.
    rate = len(leases) / leases.mean_s
    oldest_s = now - min((live.since for live in waiting), default=now)
    return FleetLoad(
        held={group.name: _held(group) for group in groups},
        waiting_held=sum(map(_would_hold, waiting)),
        computing=sum(group.backlog.seconds(now) > 0.0 for group in groups),
        waiting_s=correction * sum(live.demand.prefill_s for live in waiting),
        wait_s=max(len(waiting) / rate if rate else 0.0, oldest_s),
    )


def _held(group: Group) -> float:
    account, info = group.account, group.info
    assert account is not None
    used = account.used
    return max(
        used.hot / max(info.capacity.hot, 1),
        used.sealed / max(info.capacity.sealed, 1),
        account.sequences / info.max_num_seqs,
    )


def _would_hold(live: LiveRequest) -> float:
    """Of a group of the kind where it is least; 0 before any group is known."""
    demand = live.demand
    shares = (
        max(
            here.leased.hot / max(kind.capacity.hot, 1),
            here.leased.sealed / max(kind.capacity.sealed, 1),
            demand.request.sequences / kind.max_sequences,
        )
        for kind, here in zip(demand.kinds, demand.by_kind, strict=True)
        if here.never is None
    )
    return min(shares, default=0.0)


class Autoscaler:
    """Decides which groups run; given the time, in seconds on a monotonic clock.

    groups: all that may run, in order: the first ones are added first
    wanted: those that run, or start
    """

    def __init__(
        self, policy: AutoscalingPolicy, groups: Sequence[str], wanted: Collection[str], now: float
    ) -> None:
        if policy.min_groups > len(groups):
            raise ValueError(
                f"min_groups must be at most the number of groups, {len(groups)}, "
                f"got {policy.min_groups}"
            )
        self.policy = policy
        self._always = frozenset(groups[: policy.min_groups])
        self._groups = tuple(groups)
        self.wanted = self._always | (frozenset(wanted) & frozenset(groups))
        self._refused = False
        self._all_up = True
        self._busy = 0.0
        self._decided_at = now
        self._short_since: float | None = None
        self._spare_since: float | None = None

    def note_refused(self, error: RoutingError) -> None:
        """A request was refused. It counts if more groups would have room for it.

        One that would miss its client's deadline counts if that is later than `wait_s`; where it
        has waited until then, the load has shown it.
        """
        match error:
            case QuotaUsedUpError():
                lacks_room = False
            case DeadlineUnreachableError(projected_start_s=float(), timeout_s=timeout_s):
                lacks_room = timeout_s >= self.policy.wait_s
            case _:
                lacks_room = isinstance(error, NoRoomError)
        self._refused |= lacks_room

    def decide(self, load: FleetLoad, now: float) -> frozenset[str]:
        """Which groups run from now on; call it about once a second."""
        weight = 1.0 - math.exp(-(now - self._decided_at) / SMOOTHING_S)
        self._busy += weight * (load.computing - self._busy)
        self._decided_at = now
        running, all_up = len(self.wanted), self.wanted <= load.held.keys()
        if all_up and not self._all_up:
            self._short_since = None  # those that are new need a moment to help
        self._all_up = all_up
        need = self._need(load)
        if self._is_short(load, need, now):
            self._spare_since = None
            target = math.ceil(need / HIGH_LOAD)
            if all_up:  # else those that start may be enough
                target = max(target, running + 1)
            if target > running:
                self._add(min(target, MAX_FACTOR * running) - running)
        elif self._is_spare(load, need, now):
            self._remove_one(load)
        return self.wanted

    def _need(self, load: FleetLoad) -> float:
        """Groups that hold what runs and waits, and that compute what waits soon enough."""
        holding = sum(load.held.values()) + load.waiting_held
        return max(holding, self._busy + load.waiting_s / CLEAR_S)

    def _is_short(self, load: FleetLoad, need: float, now: float) -> bool:
        """Whether requests were refused, or for some time would have waited, or nearly so."""
        refused, self._refused = self._refused, False
        full = need > HIGH_LOAD * len(self.wanted)
        if not (refused or full or load.wait_s > self.policy.wait_s):
            self._short_since = None
            return False
        if self._short_since is None:
            self._short_since = now
        return refused or now - self._short_since >= self.policy.up_after_s

    def _is_spare(self, load: FleetLoad, need: float, now: float) -> bool:
        """Whether one group less has been enough for long."""
        enough = need <= LOW_LOAD * (len(self.wanted) - 1) and load.wait_s <= self.policy.wait_s
        if not enough or self.wanted == self._always:
            self._spare_since = None
            return False
        if self._spare_since is None:
            self._spare_since = now
        return now - self._spare_since >= self.policy.down_after_s

    def _add(self, count: int) -> None:
        others = [name for name in self._groups if name not in self.wanted]
        self.wanted |= frozenset(others[:count])
        self._short_since = None

    def _remove_one(self, load: FleetLoad) -> None:
        """The one that holds least; of equals the last."""
        candidates = [name for name in reversed(self._groups) if name in self.wanted - self._always]
        self.wanted -= {min(candidates, key=lambda name: load.held.get(name, 0.0))}
        self._spare_since = None
