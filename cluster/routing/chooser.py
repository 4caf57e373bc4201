"""What the choice of a group depends on beside the groups: the weights of the moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvmesh.cluster.routing.config import RouterTuning
from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.occupancy import Occupancy
from kvmesh.cluster.routing.placement import GroupChoice, PlacementWeights, Promise, choose

MAX_SCARCITY = 4.0  # beyond 1
HOLE_MEMORY = 0.999  # how slowly the largest demand seen is forgotten, a grant


class Chooser:
    """Chooses among all groups, or among those open to a waiting request.

    groups: of the fleet, as they come and go
    """

    def __init__(self, tuning: RouterTuning, groups: Mapping[str, Group]) -> None:
        self._groups = groups
        self._long_s = tuning.long_s
        self._occupancy = Occupancy(tuning.long_s, tuning.max_busy_share)
        self._weights = PlacementWeights(tuning.ahead_s, tuning.balance_s, tuning.hole_s)
        self._hole_pages = 0.0

    def note_arrival(self, now: float) -> None:
        self._occupancy.note_arrival(self._groups.values(), now)

    def note_grant(self, sealed_pages: int) -> None:
        """The hole to keep is as large as the largest recent demand."""
        self._hole_pages = max(self._hole_pages * HOLE_MEMORY, float(sealed_pages))
        hole = int(self._hole_pages)
        if hole != self._weights.hole_pages:
            self._weights = replace(self._weights, hole_pages=hole)

    def is_open(self, group: Group, now: float) -> bool:
        """Whether the group could take any request at all; saves asking one by one."""
        account = group.account
        return (
            account is not None
            and account.free.hot > 0
            and account.sequences < group.info.max_num_seqs
            and group.backlog.seconds(now) <= self._weights.ahead_s
        )

    def holds_back(self, demand: RequestDemand) -> bool:
        """Whether the prompt is too long to start now. Never one that has lost its group."""
        if demand.request.resumed or demand.prefill_s <= self._long_s:
            return False
        return not self._occupancy.spares_one(self._groups.values())

    def choose(self, demand: RequestDemand, now: float, promise: Promise | None) -> GroupChoice:
        """Among all groups."""
        weights = self._weights_for(demand)
        return choose(self._groups.values(), demand, now, weights, promise)

    def choose_waiting(
        self,
        demand: RequestDemand,
        open_groups: Sequence[Group],
        now: float,
        promise: Promise | None,
        waiting: int,
        deferred_s: Mapping[str, float] | None,
    ) -> GroupChoice:
        """Among open groups and, to wait for, those that hold the prefix.

        waiting: requests in the queue; with them, computing gets scarce
        deferred_s: see `choose`; None for a request that must not be deferred
        """
        weights = self._weights_for(demand)
        if deferred_s is None or not demand.cached_blocks:
            return choose(open_groups, demand, now, weights, promise, deferred_s)
        holders = [self._groups[name] for name in demand.cached_blocks if name in self._groups]
        more = [x for x in holders if x.account is not None and x not in open_groups]
        scarcity = 1.0 + min(waiting / len(self._groups), MAX_SCARCITY)
        weights = replace(weights, scarcity=scarcity)
        return choose([*open_groups, *more], demand, now, weights, promise, deferred_s)

    def _weights_for(self, demand: RequestDemand) -> PlacementWeights:
        if self.holds_back(demand):
            return replace(self._weights, longest_s=self._long_s)
        return self._weights
