"""When a group's leases are expected to end, and so when there will be room."""

from __future__ import annotations

import heapq

from sortedcontainers import SortedList

from kvmesh.cluster.routing.live import Lease
from kvmesh.workers.sizes import PageNeed

OVERRUN_SHARE = 0.1  # a lease past its projected end is given this share of its age again


class Timeline:
    """Projected ends of a group's leases; changes are O(log leases)."""

    def __init__(self) -> None:
        self._ends: SortedList[tuple[float, str, Lease]] = SortedList()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, lease: Lease, ends_at: float) -> None:
        lease.ends_at = ends_at
        self._ends.add((ends_at, lease.lease_id, lease))

    def remove(self, lease: Lease) -> None:
        self._ends.remove((lease.ends_at, lease.lease_id, lease))

    def room_at(self, need: PageNeed, free: PageNeed, now: float) -> float | None:
        """When `need` fits if nothing else is admitted; None if it never will.

        free: pages free now
        """
        at = now
        if need.fits(free):
            return at
        for end, _, lease in self._ends:
            free += lease.need
            at = max(at, _expected(end, lease, now))
            if need.fits(free):
                return at
        return None

    def freed_by(self, at: float, now: float) -> PageNeed:
        """Pages that leases which end by `at` give back."""
        freed = PageNeed(0, 0)
        for end, _, lease in self._ends:
            if end > at:
                break
            if _expected(end, lease, now) <= at:
                freed += lease.need
        return freed

    def nth_end(self, count: int, now: float) -> float:
        """When `count` of the leases will have ended."""
        if not self._ends:
            return now
        ends = (_expected(end, lease, now) for end, _, lease in self._ends)
        return heapq.nsmallest(count, ends)[-1]


def _expected(end: float, lease: Lease, now: float) -> float:
    return end if end >= now else now + OVERRUN_SHARE * (now - lease.granted_at)
