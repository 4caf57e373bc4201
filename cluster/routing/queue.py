"""The waiting requests: bounded, in order of priority and arrival, with deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sortedcontainers import SortedDict, SortedSet

from kvmesh.cluster.routing.errors import DuplicateRequestError
from kvmesh.cluster.routing.request import PlaceRequest

Rank = tuple[int, bool, int]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue.

    rank: its place; lower goes first
    deadline: on the router's clock, or None
    """

    request: PlaceRequest
    rank: Rank
    since: float
    deadline: float | None


class WaitingQueue:
    """At most `limit` requests; put, cancel and first are O(log n).

    Order: higher priority, then resumed ones, then arrival.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit must be at least 0, got {limit}")
        self.limit = limit
        self._by_rank: SortedDict[Rank, Waiting] = SortedDict()
        self._by_id: dict[str, Waiting] = {}
        self._deadlines: SortedSet[tuple[float, str]] = SortedSet()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._by_rank.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def full(self) -> bool:
        return len(self) >= self.limit

    def put(self, request: PlaceRequest, now: float) -> Waiting:
        """Add a request. The caller has seen that the queue is not full."""
        if request.request_id in self._by_id:
            raise DuplicateRequestError(request.request_id)
        deadline = None if request.timeout_s is None else now + request.timeout_s
        rank = (-request.priority, not request.resumed, self._arrivals)
        waiting = Waiting(request, rank, now, deadline)
        self._arrivals += 1
        self._by_rank[rank] = waiting
        self._by_id[request.request_id] = waiting
        if deadline is not None:
            self._deadlines.add((deadline, request.request_id))
        return waiting

    def cancel(self, request_id: str) -> Waiting | None:
        """Take a request out, wherever it stands; None if it does not wait."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            del self._by_rank[waiting.rank]
            if waiting.deadline is not None:
                self._deadlines.remove((waiting.deadline, request_id))
        return waiting

    def position(self, request_id: str) -> int:
        """How many go before it."""
        return int(self._by_rank.index(self._by_id[request_id].rank))

    def overdue(self, now: float) -> list[Waiting]:
        """Those whose time has run out, earliest first; they stay until cancelled."""
        late = self._deadlines.irange(maximum=(now, "\U0010ffff"))
        return [self._by_id[request_id] for _, request_id in late]
