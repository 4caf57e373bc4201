"""How much of the time groups compute prompts, and whether one can be spared for a long one."""

from __future__ import annotations

from collections.abc import Collection

from kvmesh.cluster.routing.group import Group

SAMPLE_EVERY = 16  # arrivals
SMOOTHING = 0.05  # weight of the newest sample


class Occupancy:
    """Sampled at arrivals, which see time averages where they come at random.

    long_s: a prompt that takes longer keeps its group from all others until it is computed
    max_busy_share: of the time, that a group may compute if others are not to wait long
    """

    def __init__(self, long_s: float, max_busy_share: float) -> None:
        self._long_s = long_s
        self._max_busy_share = max_busy_share
        self._arrivals = 0
        self._busy_groups = 0.0  # of those without a long prompt, a moving average

    def note_arrival(self, groups: Collection[Group], now: float) -> None:
        """O(groups), at one arrival in `SAMPLE_EVERY`."""
        self._arrivals += 1
        if self._arrivals % SAMPLE_EVERY == 0:
            busy = sum(x.backlog.seconds(now) > 0.0 for x in groups if not self._taken(x))
            self._busy_groups += SMOOTHING * (busy - self._busy_groups)

    def spares_one(self, groups: Collection[Group]) -> bool:
        """Whether another long prompt may start: the first always may, so that none starves."""
        up = [group for group in groups if group.account is not None]
        free = sum(not self._taken(group) for group in up)
        return free == len(up) or self._busy_groups <= self._max_busy_share * (free - 1)

    def _taken(self, group: Group) -> bool:
        return group.backlog.longest_s > self._long_s
