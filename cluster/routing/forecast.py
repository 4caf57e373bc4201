"""When a request could start, by what is expected of the leases that run.

The first in line that lacks pages is promised the group that has them soonest, and
keeps the promise until it starts. Others may overtake where they do not delay it: EASY
backfilling (Lifka 1995).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmesh.cluster.routing.chooser import Chooser
from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.live import LiveRequest
from kvmesh.cluster.routing.placement import Promise
from kvmesh.cluster.routing.verdict import NEVER, Reason, Verdicts
from kvmesh.workers.sizes import PageNeed

# Obstacles that the ends of leases and of prompts remove.
PASSING = frozenset({Reason.FULL, Reason.BUSY, Reason.BACKLOG, Reason.PROMISED})
# Obstacles that no lease's end removes.
LASTING = NEVER | {Reason.EXCLUDED, Reason.DOWN}


def room_at(group: Group, demand: RequestDemand, now: float) -> float | None:
    """When the group's pages hold the request, if nothing else is admitted; None if never."""
    account, here = group.account, demand.by_kind[group.kind]
    if account is None:
        return None
    reserve = max(account.reserve, here.to_grow)
    free = PageNeed(account.free.hot, account.free.sealed - reserve)
    at = group.timeline.room_at(here.leased, free, now)
    beyond = account.sequences + demand.request.sequences - group.info.max_num_seqs
    if at is None or beyond <= 0:
        return at
    return max(at, group.timeline.nth_end(beyond, now))


def earliest_start(
    groups: Mapping[str, Group], demand: RequestDemand, verdicts: Verdicts, now: float
) -> float | None:
    """The soonest any group has the pages and starts on the prompt, were it first in line."""
    starts: list[float] = []
    for verdict in verdicts:
        if verdict.reason not in LASTING:
            group = groups[verdict.group]
            at = room_at(group, demand, now)
            if at is not None:
                starts.append(max(at, now + group.backlog.seconds(now)))
    return min(starts, default=None)


class PromisedStart:
    """At most one promise at a time.

    current: the promise, or None
    """

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

    def binding(self, live: LiveRequest) -> Promise | None:
        """The promise that the request may not break.

        None binds one of higher priority than its holder, or resumed where that is not.
        """
        outranked = self._holder is not None and live.rank[:2] < self._holder.rank[:2]
        return None if outranked else self.current

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
        chooser: Chooser,
    ) -> None:
        """Promise a start to the first request in line that lacks pages, or renew its promise."""
        if self.current is not None and self._holder is live:
            group = groups[self.current.group]
            at = room_at(group, live.demand, now)
            self._set(live, None if at is None else _promise_on(group, live.demand, at, now))
        elif self.binding(live) is None:
            verdicts = chooser.choose(live.demand, now, None).verdicts
            if any(verdict.reason is Reason.BACKLOG for verdict in verdicts):
                return  # a group has the pages; it only lacks a moment
            promise = _best_promise(groups, live.demand, verdicts, now)
            if promise is not None:
                self._set(live, promise)
                if live.promised_at is None:
                    live.promised_at = promise.at

    def _set(self, holder: LiveRequest | None, promise: Promise | None) -> None:
        self.current = promise
        self._holder = holder if promise is not None else None


def _best_promise(
    groups: Mapping[str, Group], demand: RequestDemand, verdicts: Verdicts, now: float
) -> Promise | None:
    """The group whose pages hold the request first, and what else they hold then."""
    best: tuple[float, Group] | None = None
    for verdict in verdicts:
        if verdict.reason in PASSING:
            group = groups[verdict.group]
            at = room_at(group, demand, now)
            if at is not None and (best is None or at < best[0]):
                best = (at, group)
    return None if best is None else _promise_on(best[1], demand, best[0], now)


def _promise_on(group: Group, demand: RequestDemand, at: float, now: float) -> Promise:
    """A promise of the group's pages from `at` on."""
    account, need = group.account, demand.by_kind[group.kind].leased
    assert account is not None
    freed = group.timeline.freed_by(at, now)
    spare = PageNeed(
        account.free.hot + freed.hot - need.hot,
        account.free.sealed + freed.sealed - need.sealed - account.reserve,
    )
    return Promise(demand.request.request_id, group.name, at, spare)
