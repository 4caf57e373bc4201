"""The waiting requests: bounded, fair between tenants, with deadlines."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sortedcontainers import SortedDict, SortedSet

from kvmesh.cluster.routing.errors import DuplicateRequestError
from kvmesh.cluster.routing.request import PlaceRequest

Rank = tuple[int, bool, float, int]
Line = SortedDict[Rank, "Waiting"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue.

    rank: its place among its tenant's; lower goes first
    deadline: on the router's clock, or None
    """

    request: PlaceRequest
    rank: Rank
    since: float
    deadline: float | None


class WaitingQueue:
    """At most `limit` requests; put and cancel are O(log n).

    Higher priority goes first, then resumed requests, then the tenant that has used
    least, then the earliest `due` time.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit must be at least 0, got {limit}")
        self.limit = limit
        self._lines: dict[str, Line] = {}
        self._by_id: dict[str, Waiting] = {}
        self._deadlines: SortedSet[tuple[float, str]] = SortedSet()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def full(self) -> bool:
        return len(self) >= self.limit

    def get(self, request_id: str) -> Waiting | None:
        return self._by_id.get(request_id)

    def put(self, request: PlaceRequest, now: float, due: float) -> Waiting:
        """Add a request. The caller has seen that the queue is not full.

        due: among equals, the earlier goes first. It is fixed on entry and grows
            with the clock, so nobody is overtaken for ever.
        """
        if request.request_id in self._by_id:
            raise DuplicateRequestError(request.request_id)
        deadline = None if request.timeout_s is None else now + request.timeout_s
        rank = (-request.priority, not request.resumed, due, self._arrivals)
        waiting = Waiting(request, rank, now, deadline)
        self._arrivals += 1
        self._lines.setdefault(request.tenant, SortedDict())[rank] = waiting
        self._by_id[request.request_id] = waiting
        if deadline is not None:
            self._deadlines.add((deadline, request.request_id))
        return waiting

    def cancel(self, request_id: str) -> Waiting | None:
        """Take a request out, wherever it stands; None if it does not wait."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is None:
            return None
        tenant = waiting.request.tenant
        del self._lines[tenant][waiting.rank]
        if not self._lines[tenant]:
            del self._lines[tenant]
        if waiting.deadline is not None:
            self._deadlines.remove((waiting.deadline, request_id))
        return waiting

    def in_order(self, used: Callable[[str], float]) -> Iterator[Waiting]:
        """All that wait, first to last; the queue must not change meanwhile.

        used: how much a tenant has used so far
        """
        lines = {tenant: iter(line.values()) for tenant, line in self._lines.items()}
        heap = [_entry(next(lines[tenant]), used(tenant)) for tenant in lines]
        heapq.heapify(heap)
        while heap:
            key, waiting = heap[0]
            yield waiting
            follower = next(lines[waiting.request.tenant], None)
            if follower is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, _entry(follower, key[2]))

    def overdue(self, now: float) -> list[Waiting]:
        """Those whose time has run out, earliest first; they stay until cancelled."""
        late = self._deadlines.irange(maximum=(now, "\U0010ffff"))
        return [self._by_id[request_id] for _, request_id in late]


def _entry(waiting: Waiting, used: float) -> tuple[tuple[int, bool, float, float, int], Waiting]:
    priority, fresh, due, arrival = waiting.rank
    return (priority, fresh, used, due, arrival), waiting
