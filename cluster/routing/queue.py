"""The waiting requests: bounded, fair between tenants, with deadlines.

Higher priority goes first, then requests that lost their group, then the tenant that has
used least. A tenant's requests go by the time they are due. One that has missed it loses
less by waiting than others would by becoming late, so it lets these pass, but only until
it has waited as long as 99% of the requests would have if all were served in order of
arrival. Then it is urgent, and goes first.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from sortedcontainers import SortedDict, SortedKeyList

from kvmesh.cluster.routing.accepted_formats import AcceptedFormats
from kvmesh.cluster.routing.live import LiveRequest, Rank
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.rolling import RollingQuantile

WAITS = 1024  # the latest waits, first come, first served, that bound how long late requests wait
WAIT_QUANTILE = 0.99
DEPARTURES = 64  # the latest ones, that tell how fast requests leave
MIN_DEPARTURES = 4
URGENT_EVERY_S = 0.05  # which requests are urgent is found out again after this time


class LineKey(NamedTuple):
    """What the requests of a line have in common: what may keep all of them from starting."""

    tenant: str
    past: Past
    accepts: AcceptedFormats

    @classmethod
    def of(cls, live: LiveRequest) -> LineKey:
        request = live.request
        return cls(request.tenant, request.past, request.accepts)


class _Line:
    """Requests of one key: those not yet due by due time, those overdue by arrival.

    Whatever the order, as many requests leave: in order of arrival, the n-th to leave
    would be the n-th that came.
    """

    def __init__(self) -> None:
        self.timely: SortedDict[Rank, LiveRequest] = SortedDict()
        self.late: SortedDict[Rank, LiveRequest] = SortedDict()
        self._urgent_until: dict[tuple[int, int], float] = {}  # by the class of priority
        self._urgent_at = -math.inf
        self._arrivals: deque[float] = deque()  # of as many as wait
        self._left: deque[float]  # since it was empty: the first to come, then each that left

    def __len__(self) -> int:
        return len(self.timely) + len(self.late)

    def put(self, live: LiveRequest) -> None:
        if not self:
            self._left = deque([live.since], maxlen=DEPARTURES)
        self.timely[live.rank] = live
        self._arrivals.append(live.since)

    def remove(self, live: LiveRequest, now: float) -> float:
        """Returns how long the request that would have left in its place has waited."""
        self._drop(live)
        self._left.append(now)
        return now - self._arrivals.popleft()

    def retract(self, live: LiveRequest) -> None:
        """Undo the latest `put`: that request has not waited."""
        self._drop(live)
        self._arrivals.pop()

    def age(self, now: float, bound_s: float) -> None:
        """Those whose due time has passed join the late ones: O(log n) for each, once."""
        while overdue := [x for x in self._fronts() if x.due < now]:
            for live in overdue:
                del self.timely[live.rank]
                self.late[_late_rank(live)] = live
        if now - self._urgent_at >= URGENT_EVERY_S:
            self._urgent_at = now
            self._urgent_until = self._find_urgent(now, bound_s)

    def is_urgent(self, late: LiveRequest) -> bool:
        """Whether a late request goes before those that are not due yet."""
        return late.since <= self._urgent_until.get(late.rank[:2], -math.inf)

    def _drop(self, live: LiveRequest) -> None:
        if self.timely.pop(live.rank, None) is None:
            del self.late[_late_rank(live)]

    def _find_urgent(self, now: float, bound_s: float) -> dict[tuple[int, int], float]:
        """Late requests become urgent in time to start: after all late ones before them.

        Small ones would fill a full group again before a large one fits, so it is urgent
        earlier, by the time in which the group frees its pages.
        """
        until: dict[tuple[int, int], float] = {}  # late ones that came by then are urgent
        rate = self._rate(now)
        bound_s = max(bound_s, len(self) / rate)
        for count, live in enumerate(self.late.values(), 1):
            if live.since + bound_s < now + count / rate + live.drain_s:
                until[live.rank[:2]] = live.since
        return until

    def _rate(self, now: float) -> float:
        """Requests that leave in a second."""
        if len(self._left) <= MIN_DEPARTURES:
            return math.inf
        return (len(self._left) - 1) / max(now - self._left[0], 1e-9)

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
    """`limit` requests, or more where the caller puts them; put and remove are O(log n)."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit must be at least 0, got {limit}")
        self.limit = limit
        self._lines: dict[LineKey, _Line] = {}
        self._by_tenant: Counter[str] = Counter()
        self._deadlines: SortedKeyList[LiveRequest, float] = SortedKeyList(key=_deadline)
        self._waits = RollingQuantile(WAITS)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[LiveRequest]:
        """All that wait, in no order."""
        for line in self._lines.values():
            yield from line.timely.values()
            yield from line.late.values()

    def count_of(self, tenant: str) -> int:
        """How many of a tenant's requests wait."""
        return self._by_tenant[tenant]

    @property
    def tenants(self) -> Collection[str]:
        """Those of which requests wait."""
        return self._by_tenant.keys()

    @property
    def full(self) -> bool:
        return self._count >= self.limit

    def note_passed(self) -> None:
        """A request came and did not have to wait."""
        self._waits.add(0.0)

    def put(self, live: LiveRequest) -> None:
        """Add a request. The caller has seen that it may wait."""
        self._lines.setdefault(LineKey.of(live), _Line()).put(live)
        self._by_tenant[live.request.tenant] += 1
        self._count += 1
        if live.deadline is not None:
            self._deadlines.add(live)

    def remove(self, live: LiveRequest, now: float) -> None:
        """Take a request out, wherever it stands."""
        self._waits.add(self._lines[LineKey.of(live)].remove(live, now))
        self._gone(live)

    def retract(self, live: LiveRequest) -> None:
        """Take out the request that was put last, as if it had not come."""
        self._lines[LineKey.of(live)].retract(live)
        self._gone(live)

    def in_order(
        self,
        used: Callable[[str], float],
        now: float,
        wanted: Callable[[LineKey], bool] | None = None,
    ) -> Iterator[LiveRequest]:
        """All that wait, first to last; the queue must not change meanwhile.

        used: how much a tenant has used so far
        wanted: whether the rest of a line is to be read; asked again before each request
        """
        bound_s = self._waits.quantile(WAIT_QUANTILE) if len(self._waits) else 0.0
        heap: list[_Entry] = []
        for key, line in self._lines.items():
            line.age(now, bound_s)
            for part in (line.timely, line.late):
                heap += _entries(iter(part.values()), used(key.tenant), line, now)
        heapq.heapify(heap)
        while heap:
            (_, _, used_by, *_), live, line, followers = heap[0]
            entry: list[_Entry] = []
            if wanted is None or wanted(LineKey.of(live)):
                yield live
                entry = _entries(followers, used_by, line, now)
            if entry:
                heapq.heapreplace(heap, entry[0])
            else:
                heapq.heappop(heap)

    def overdue(self, now: float) -> list[LiveRequest]:
        """Those whose deadline has passed, earliest first; they stay until removed."""
        return list(self._deadlines.irange_key(max_key=now))

    def _gone(self, live: LiveRequest) -> None:
        """A request is in its line no more."""
        key = LineKey.of(live)
        if not self._lines[key]:
            del self._lines[key]
        self._by_tenant[key.tenant] -= 1
        if not self._by_tenant[key.tenant]:
            del self._by_tenant[key.tenant]
        self._count -= 1
        if live.deadline is not None:
            self._deadlines.remove(live)


# -priority, -past, used, turn, at, arrival
_Key = tuple[int, int, float, int, float, int]
_Entry = tuple[_Key, LiveRequest, _Line, Iterator[LiveRequest]]
URGENT, TIMELY, LATE = range(3)


def _entries(
    followers: Iterator[LiveRequest], used: float, line: _Line, now: float
) -> list[_Entry]:
    """The next of the followers, if there is one."""
    for live in followers:
        priority, past, due, arrival = live.rank
        turn, at = TIMELY, due
        if due < now:
            turn, at = (URGENT if line.is_urgent(live) else LATE), live.since
        return [((priority, past, used, turn, at, arrival), live, line, followers)]
    return []


def _late_rank(live: LiveRequest) -> Rank:
    priority, past, _, arrival = live.rank
    return (priority, past, live.since, arrival)


def _deadline(live: LiveRequest) -> float:
    assert live.deadline is not None
    return live.deadline
