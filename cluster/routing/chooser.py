"""What the choice of a group depends on besides the groups: the weights of the moment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kvmesh.cluster.routing.config import RouterTuning
from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.placement import GroupChoice, PlacementWeights, Promise, choose
from kvmesh.cluster.routing.request import Past

SAMPLE_EVERY = 16  # arrivals
SMOOTHING = 0.05  # weight of the newest sample


class Chooser:
    """Chooses among all groups, or among those open to a waiting request.

    fleet: whose groups come and go, and whose tenants have quotas
    """

    def __init__(self, tuning: RouterTuning, fleet: Fleet) -> None:
        self._fleet = fleet
        self._groups: Mapping[str, Group] = fleet.groups
        self._long_s = tuning.long_s
        self._max_busy_share = tuning.max_busy_share
        self._arrivals = 0
        self._busy_groups = 0.0  # of those without a long prompt, a moving average
        self._weights = PlacementWeights(tuning.ahead_s, tuning.balance_s)

    def note_arrival(self, now: float) -> None:
        """Sample which groups compute: random arrivals see time averages. O(groups), at times."""
        self._arrivals += 1
        if self._arrivals % SAMPLE_EVERY == 0:
            others = [x for x in self._groups.values() if not self._has_long(x)]
            busy = sum(group.backlog.seconds(now) > 0.0 for group in others)
            self._busy_groups += SMOOTHING * (busy - self._busy_groups)

    def open_groups(self, now: float) -> list[Group]:
        """Those that could take any request at all; saves asking the others one by one."""
        return [
            group
            for group in self._groups.values()
            if group.account is not None
            and group.account.free.hot > 0
            and group.account.sequences < group.info.max_num_seqs
            and group.backlog.seconds(now) <= self._weights.ahead_s
        ]

    def holds_back(self, demand: RequestDemand) -> bool:
        """Whether the prompt would take a group that other requests need.

        The first long prompt may always start, so that none starves; never held back is
        a request that has lost its group.
        """
        if demand.request.past is Past.RAN or demand.prefill_s <= self._long_s:
            return False
        up = [group for group in self._groups.values() if group.account is not None]
        spare = sum(not self._has_long(group) for group in up)
        return spare < len(up) and self._busy_groups > self._max_busy_share * (spare - 1)

    def choose(self, demand: RequestDemand, now: float) -> GroupChoice:
        """Among all groups."""
        return choose(self._groups.values(), demand, now, self._weights_for(demand))

    def choose_waiting(
        self,
        demand: RequestDemand,
        open_groups: Sequence[Group],
        possible: Iterable[Group],
        now: float,
        promises: Mapping[str, Promise],
        deferred_s: Mapping[str, float],
    ) -> GroupChoice:
        """Among open groups and, to wait for, those that hold the prefix.

        possible: those that it may be given or wait for
        promises: by group, to requests before this one
        deferred_s: see `choose`
        """
        holders = (group for group in possible if group.name in demand.cached_blocks)
        more = [group for group in holders if group not in open_groups]
        return choose(
            [*open_groups, *more], demand, now, self._weights_for(demand), promises, deferred_s
        )

    def _weights_for(self, demand: RequestDemand) -> PlacementWeights:
        quota_left = self._fleet.quota_left(demand.request)
        longest_s = self._long_s if self.holds_back(demand) else math.inf
        if longest_s == quota_left == math.inf:
            return self._weights
        return replace(self._weights, longest_s=longest_s, quota_left=quota_left)

    def _has_long(self, group: Group) -> bool:
        """Whether a long prompt keeps the group from all others."""
        return group.backlog.longest_s > self._long_s
