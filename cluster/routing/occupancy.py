"""How much of the time groups compute prompts, and whether one can be spared for a long one."""

from __future__ import annotations

from collections.abc import Collection

from kvmesh.cluster.routing.placement import GroupView

SAMPLE_EVERY = 16  # arrivals
SMOOTHING = 0.05  # weight of the newest sample


class Occupancy:
    """Seen at arrivals, which see time averages where they come at random.

    long_s: a prompt that takes longer keeps its group from all others until it is computed
    busy_most: of the time, that a group may compute if others are not to wait long
    """

    def __init__(self, long_s: float, busy_most: float) -> None:
        self._long_s = long_s
        self._busy_most = busy_most
        self._arrivals = 0
        self._busy_groups = 0.0  # of those without a long prompt, a moving average

    def note_arrival(self, views: Collection[GroupView], now: float) -> None:
        """O(groups), at one arrival in `SAMPLE_EVERY`."""
        self._arrivals += 1
        if self._arrivals % SAMPLE_EVERY == 0:
            busy = sum(x.backlog.seconds(now) > 0.0 for x in views if not self._taken(x))
            self._busy_groups += SMOOTHING * (busy - self._busy_groups)

    def spares_one(self, views: Collection[GroupView]) -> bool:
        """Whether another long prompt may begin: the first may, so that none waits for ever."""
        up = [view for view in views if view.reported]
        free = sum(not self._taken(view) for view in up)
        return free == len(up) or self._busy_groups <= self._busy_most * (free - 1)

    def _taken(self, view: GroupView) -> bool:
        return view.backlog.longest_s > self._long_s
