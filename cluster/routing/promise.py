"""The promise of a start, and the request that holds it: EASY backfilling (Lifka 1995).

The first in line that lacks pages is promised the group that has them soonest, and
keeps the promise until it starts. Others may overtake where they do not delay it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from kvmesh.cluster.routing.forecast import best_promise, promise_on, room_at
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.live import LiveRequest
from kvmesh.cluster.routing.placement import Promise
from kvmesh.cluster.routing.verdict import Reason, Verdicts


class PromisedStart:
    """At most one promise at a time. current: with its pages and time, or None"""

    def __init__(self) -> None:
        self.current: Promise | None = None
        self._holder: LiveRequest | None = None

    def forget(self, live: LiveRequest) -> None:
        """The request no longer waits."""
        if self._holder is live:
            self._set(None, None)

    def group_down(self, group: str) -> None:
        if self.current is not None and self.current.group == group:
            self._set(None, None)

    def outranked_by(self, live: LiveRequest) -> bool:
        """Of higher priority than the promise's holder, or resumed and the holder is not."""
        return self._holder is not None and live.rank[:2] < self._holder.rank[:2]

    def in_order(self, order: Iterator[LiveRequest]) -> Iterator[LiveRequest]:
        """Requests above the holder of the promise, the holder, then all others in order."""
        holder = self._holder
        if holder is None:
            yield from order
            return
        above = holder.rank[:2]
        for live in order:
            if live.rank[:2] >= above:
                yield holder
                if live is not holder:
                    yield live
                break
            yield live
        yield from (live for live in order if live is not holder)

    def consider(
        self,
        live: LiveRequest,
        groups: Mapping[str, Group],
        now: float,
        verdicts: Callable[[], Verdicts],
    ) -> None:
        """Promise a start to the first request in line that lacks pages, or renew its promise.

        verdicts: on it, of all groups; made only if they are needed
        """
        if self.current is not None and self._holder is live:
            group = groups[self.current.group]
            at = room_at(group, live.demand, now)
            self._set(live, None if at is None else promise_on(group, live.demand, at, now))
        elif self.current is None or self.outranked_by(live):
            found = verdicts()
            if any(verdict.reason is Reason.BACKLOG for verdict in found):
                return  # a group has the pages; it only lacks a moment
            promise = best_promise(groups, live.demand, found, now)
            if promise is not None:
                self._set(live, promise)
                if live.promised_at is None:
                    live.promised_at = promise.at

    def _set(self, holder: LiveRequest | None, promise: Promise | None) -> None:
        self.current = promise
        self._holder = holder if promise is not None else None
