"""When a group's leases are expected to end, and so when there will be room."""

from __future__ import annotations

from collections.abc import Mapping

from sortedcontainers import SortedList

from kvmesh.cluster.routing.events import Lease
from kvmesh.workers.sizes import PageNeed

OVERRUN_SHARE = 0.1  # a lease past its projected end is given this share of its age again


class Timeline:
    """Projected ends of a group's leases; add and remove are O(log leases)."""

    def __init__(self) -> None:
        self._ends: SortedList[tuple[float, str]] = SortedList()
        self._by_id: dict[str, tuple[float, float]] = {}  # lease id -> (end, start)

    def __len__(self) -> int:
        return len(self._ends)

    def put(self, lease_id: str, start: float, end: float) -> None:
        """Add a lease, or project its end anew."""
        self.remove(lease_id)
        self._ends.add((end, lease_id))
        self._by_id[lease_id] = (end, start)

    def remove(self, lease_id: str) -> None:
        known = self._by_id.pop(lease_id, None)
        if known is not None:
            self._ends.remove((known[0], lease_id))

    def room_at(
        self, need: PageNeed, free: PageNeed, leases: Mapping[str, Lease], now: float
    ) -> float | None:
        """When `need` fits if nothing else is admitted; None if it never will.

        free: pages free now; leases: by id; what each frees at its end
        """
        hot, sealed, at = free.hot, free.sealed, now
        if need.hot <= hot and need.sealed <= sealed:
            return now
        for end, lease_id in self._ends:
            gain = leases[lease_id].need
            hot, sealed = hot + gain.hot, sealed + gain.sealed
            at = max(at, self._expected(end, lease_id, now))
            if need.hot <= hot and need.sealed <= sealed:
                return at
        return None

    def freed_by(self, at: float, leases: Mapping[str, Lease], now: float) -> PageNeed:
        """Pages that leases which end by `at` give back."""
        hot = sealed = 0
        for end, lease_id in self._ends:
            if end > at:
                break
            if self._expected(end, lease_id, now) <= at:
                gain = leases[lease_id].need
                hot, sealed = hot + gain.hot, sealed + gain.sealed
        return PageNeed(hot, sealed)

    def nth_end(self, count: int, now: float) -> float:
        """When `count` of the leases will have ended."""
        if not self._ends:
            return now
        end, lease_id = self._ends[min(count, len(self._ends)) - 1]
        return self._expected(end, lease_id, now)

    def _expected(self, end: float, lease_id: str, now: float) -> float:
        if end >= now:
            return end
        start = self._by_id[lease_id][1]
        return now + OVERRUN_SHARE * (now - start)
