"""The waiting requests: bounded, fair between tenants, with deadlines."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sortedcontainers import SortedDict, SortedSet

from kvmesh.cluster.routing.errors import DuplicateRequestError
from kvmesh.cluster.routing.request import PlaceRequest

Rank = tuple[int, bool, float, int]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue.

    rank: its place among its tenant's; lower goes first
    due: until then it should have begun
    deadline: until then it must have; on the router's clock, or None
    """

    request: PlaceRequest
    rank: Rank
    since: float
    due: float
    deadline: float | None


class _Line:
    """One tenant's requests: those not yet due by due time, those overdue by arrival."""

    def __init__(self) -> None:
        self.timely: SortedDict[Rank, Waiting] = SortedDict()
        self.late: SortedDict[Rank, Waiting] = SortedDict()

    def __bool__(self) -> bool:
        return bool(self.timely or self.late)

    def put(self, waiting: Waiting) -> None:
        self.timely[waiting.rank] = waiting

    def remove(self, waiting: Waiting) -> None:
        if self.timely.pop(waiting.rank, None) is None:
            del self.late[_late_rank(waiting)]

    def age(self, now: float) -> None:
        """Those whose due time has passed join the late ones: O(log n) for each, once."""
        overdue = [x for x in self._fronts() if x.due < now]
        while overdue:
            for waiting in overdue:
                del self.timely[waiting.rank]
                self.late[_late_rank(waiting)] = waiting
            overdue = [x for x in self._fronts() if x.due < now]

    def _fronts(self) -> list[Waiting]:
        """The first of each class of priority."""
        fronts: list[Waiting] = []
        at = 0
        while at < len(self.timely):
            waiting = self.timely.peekitem(at)[1]
            fronts.append(waiting)
            at = self.timely.bisect_left((*waiting.rank[:2], math.inf, 0))
        return fronts


class WaitingQueue:
    """At most `limit` requests; put and cancel are O(log n).

    Higher priority goes first, then resumed requests, then the tenant that has used
    least. A tenant's requests go by the time they are due, and those that have missed
    it after those that have not: what is late already loses less by waiting than
    others would by becoming late. So that nobody waits for ever, those that have waited
    for longer than `patience_s` have their turns, oldest first and whoever's they are.
    """

    def __init__(self, limit: int, patience_s: float = math.inf) -> None:
        if limit < 0:
            raise ValueError(f"limit must be at least 0, got {limit}")
        self.limit = limit
        self.patience_s = patience_s
        self._lines: dict[str, _Line] = {}
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
        """Add a request that should begin by `due`. The caller has seen that there is room."""
        if request.request_id in self._by_id:
            raise DuplicateRequestError(request.request_id)
        deadline = None if request.timeout_s is None else now + request.timeout_s
        rank = (-request.priority, not request.resumed, due, self._arrivals)
        waiting = Waiting(request, rank, now, due, deadline)
        self._arrivals += 1
        self._lines.setdefault(request.tenant, _Line()).put(waiting)
        self._by_id[request.request_id] = waiting
        if deadline is not None:
            self._deadlines.add((deadline, request.request_id))
        return waiting

    def cancel(self, request_id: str) -> Waiting | None:
        """Take a request out, wherever it stands; None if it does not wait."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is None:
            return None
        line = self._lines[waiting.request.tenant]
        line.remove(waiting)
        if not line:
            del self._lines[waiting.request.tenant]
        if waiting.deadline is not None:
            self._deadlines.remove((waiting.deadline, request_id))
        return waiting

    def in_order(
        self, used: Callable[[str], float], now: float, *, aged_first: bool = True
    ) -> Iterator[Waiting]:
        """All that wait, first to last; the queue must not change meanwhile.

        used: how much a tenant has used so far
        aged_first: whether it is the turn of those that have waited beyond patience
        """
        aged_before = now - self.patience_s if aged_first else -math.inf
        heap: list[_Entry] = []
        for tenant, line in self._lines.items():
            line.age(now)
            for late, sorted_line in enumerate((line.timely, line.late)):
                followers = iter(sorted_line.values())
                if (first := next(followers, None)) is not None:
                    heap.append(self._entry(first, late, used(tenant), followers, aged_before))
        heapq.heapify(heap)
        while heap:
            _, waiting, followers = heap[0]
            yield waiting
            follower = next(followers, None)
            if follower is None:
                heapq.heappop(heap)
            else:
                late = int(follower.due < now)
                heapq.heapreplace(
                    heap,
                    self._entry(
                        follower, late, used(follower.request.tenant), followers, aged_before
                    ),
                )

    def overdue(self, now: float) -> list[Waiting]:
        """Those whose deadline has passed, earliest first; they stay until cancelled."""
        late = self._deadlines.irange(maximum=(now, "\U0010ffff"))
        return [self._by_id[request_id] for _, request_id in late]

    def _entry(
        self,
        waiting: Waiting,
        late: int,
        used: float,
        followers: Iterator[Waiting],
        aged_before: float,
    ) -> _Entry:
        priority, fresh, due, arrival = waiting.rank
        if waiting.since < aged_before:
            return (priority, fresh, 0, 0.0, 0, waiting.since, arrival), waiting, followers
        at = waiting.since if late else due
        return (priority, fresh, 1, used, late, at, arrival), waiting, followers


_Key = tuple[int, bool, int, float, int, float, int]
_Entry = tuple[_Key, Waiting, Iterator[Waiting]]


def _late_rank(waiting: Waiting) -> Rank:
    priority, fresh, _, arrival = waiting.rank
    return (priority, fresh, waiting.since, arrival)
