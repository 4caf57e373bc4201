"""The promise of a start, and who holds it: EASY backfilling (Lifka 1995).

The first in line that lacks pages is promised the group that has them soonest, and
keeps the promise until it starts. Others may overtake where they do not delay it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from kvmesh.cluster.routing.events import Lease
from kvmesh.cluster.routing.forecast import best_promise, promise_on, room_at
from kvmesh.cluster.routing.placement import Asked, GroupView, Promise
from kvmesh.cluster.routing.queue import Waiting, WaitingQueue
from kvmesh.cluster.routing.verdict import Reason, Verdicts


class PromisedStart:
    """At most one promise at a time. current: with its pages and time, or None"""

    def __init__(self, queue: WaitingQueue) -> None:
        self.current: Promise | None = None
        self._queue = queue
        self._first_at: dict[str, float] = {}

    def first_at(self, request_id: str) -> float | None:
        """When the start that the request was promised first was due."""
        return self._first_at.get(request_id)

    def forget(self, request_id: str) -> None:
        """The request waits no more."""
        self._first_at.pop(request_id, None)
        if self.current is not None and self.current.request_id == request_id:
            self.current = None

    def group_down(self, group: str) -> None:
        if self.current is not None and self.current.group == group:
            self.current = None

    def outranked_by(self, waiting: Waiting) -> bool:
        """Of higher priority than the promise's holder, or resumed and the holder is not."""
        holder = self._holder()
        return holder is not None and waiting.rank[:2] < holder.rank[:2]

    def in_order(self, order: Iterator[Waiting]) -> Iterator[Waiting]:
        """Those above the holder of the promise, the holder, then everybody else in order."""
        holder = self._holder()
        if holder is None:
            yield from order
            return
        above = holder.rank[:2]
        for waiting in order:
            if waiting.rank[:2] >= above:
                yield holder
                if waiting is not holder:
                    yield waiting
                break
            yield waiting
        yield from (waiting for waiting in order if waiting is not holder)

    def consider(
        self,
        asked: Asked,
        views: Mapping[str, GroupView],
        leases: Mapping[str, Lease],
        now: float,
        *,
        above: bool,
        verdicts: Callable[[], Verdicts],
    ) -> None:
        """Promise a start to the first request in line that lacks pages, or renew its promise.

        above: it outranks the holder; verdicts: on it, of all groups, made if they are needed
        """
        held = self.current
        if held is not None and held.request_id == asked.request_id:
            view = views[held.group]
            at = room_at(view, asked, leases, now)
            self.current = None if at is None else promise_on(view, asked, leases, at, now)
        elif held is None or above:
            found = verdicts()
            if any(verdict.reason is Reason.BACKLOG for verdict in found):
                return  # a group has the pages; it lacks but a moment
            promise = best_promise(views, asked, found, leases, now)
            if promise is not None:
                self.current = promise
                self._first_at.setdefault(asked.request_id, promise.at)

    def _holder(self) -> Waiting | None:
        return self._queue.get(self.current.request_id) if self.current else None
