"""The waiting requests: bounded, fair between tenants, with deadlines."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator

from sortedcontainers import SortedDict, SortedKeyList

from kvmesh.cluster.routing.live import LiveRequest, Rank


class _Line:
    """One tenant's requests: those not yet due by due time, those overdue by arrival."""

    def __init__(self) -> None:
        self.timely: SortedDict[Rank, LiveRequest] = SortedDict()
        self.late: SortedDict[Rank, LiveRequest] = SortedDict()

    def __bool__(self) -> bool:
        return bool(self.timely or self.late)

    def put(self, live: LiveRequest) -> None:
        self.timely[live.rank] = live

    def remove(self, live: LiveRequest) -> None:
        if self.timely.pop(live.rank, None) is None:
            del self.late[_late_rank(live)]

    def age(self, now: float) -> None:
        """Those whose due time has passed join the late ones: O(log n) for each, once."""
        overdue = [x for x in self._fronts() if x.due < now]
        while overdue:
            for live in overdue:
                del self.timely[live.rank]
                self.late[_late_rank(live)] = live
            overdue = [x for x in self._fronts() if x.due < now]

    def _fronts(self) -> list[LiveRequest]:
        """The first of each class of priority."""
        fronts: list[LiveRequest] = []
        at = 0
        while at < len(self.timely):
            live = self.timely.peekitem(at)[1]
            fronts.append(live)
            at = self.timely.bisect_left((*live.rank[:2], math.inf, 0))
        return fronts


class WaitingQueue:
    """At most `limit` requests; put and remove are O(log n).

    Higher priority goes first, then resumed requests, then the tenant that has used
    least. A tenant's requests go by the time they are due, and those that have missed
    it after those that have not: what is late already loses less by waiting than
    others would by becoming late. So that no request starves, those that have waited
    longer than `patience_s` have their turns, oldest first, of whichever tenant.
    """

    def __init__(self, limit: int, patience_s: float = math.inf) -> None:
        if limit < 0:
            raise ValueError(f"limit must be at least 0, got {limit}")
        self.limit = limit
        self.patience_s = patience_s
        self._lines: dict[str, _Line] = {}
        self._deadlines: SortedKeyList[LiveRequest, float] = SortedKeyList(key=_deadline)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def count_of(self, tenant: str) -> int:
        """How many of a tenant's requests wait."""
        line = self._lines.get(tenant)
        return 0 if line is None else len(line.timely) + len(line.late)

    @property
    def full(self) -> bool:
        return self._count >= self.limit

    def put(self, live: LiveRequest) -> None:
        """Add a request. The caller has seen that there is room."""
        self._lines.setdefault(live.request.tenant, _Line()).put(live)
        self._count += 1
        if live.deadline is not None:
            self._deadlines.add(live)

    def remove(self, live: LiveRequest) -> None:
        """Take a request out, wherever it stands."""
        line = self._lines[live.request.tenant]
        line.remove(live)
        self._count -= 1
        if not line:
            del self._lines[live.request.tenant]
        if live.deadline is not None:
            self._deadlines.remove(live)

    def in_order(
        self, used: Callable[[str], float], now: float, *, aged_first: bool = True
    ) -> Iterator[LiveRequest]:
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
                    heap.append(_entry(first, late, used(tenant), followers, aged_before))
        heapq.heapify(heap)
        while heap:
            _, live, followers = heap[0]
            yield live
            follower = next(followers, None)
            if follower is None:
                heapq.heappop(heap)
            else:
                late, used_by = int(follower.due < now), used(follower.request.tenant)
                heapq.heapreplace(heap, _entry(follower, late, used_by, followers, aged_before))

    def overdue(self, now: float) -> list[LiveRequest]:
        """Those whose deadline has passed, earliest first; they stay until removed."""
        return list(self._deadlines.irange_key(max_key=now))


# -priority, not resumed, whether it is not its turn by age, used, late, at, arrival
_Key = tuple[int, bool, int, float, int, float, int]
_Entry = tuple[_Key, LiveRequest, Iterator[LiveRequest]]


def _entry(
    live: LiveRequest, late: int, used: float, followers: Iterator[LiveRequest], aged_before: float
) -> _Entry:
    priority, fresh, due, arrival = live.rank
    if live.since < aged_before:
        return (priority, fresh, 0, 0.0, 0, live.since, arrival), live, followers
    return (priority, fresh, 1, used, late, live.since if late else due, arrival), live, followers


def _late_rank(live: LiveRequest) -> Rank:
    priority, fresh, _, arrival = live.rank
    return (priority, fresh, live.since, arrival)


def _deadline(live: LiveRequest) -> float:
    assert live.deadline is not None
    return live.deadline
