"""When a request could start, by what is expected of the leases that run."""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.group import Group
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


def best_promise(
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
    return None if best is None else promise_on(best[1], demand, best[0], now)


def promise_on(group: Group, demand: RequestDemand, at: float, now: float) -> Promise:
    """A promise of the group's pages from `at` on."""
    account, need = group.account, demand.by_kind[group.kind].leased
    assert account is not None
    freed = group.timeline.freed_by(at, now)
    spare = PageNeed(
        account.free.hot + freed.hot - need.hot,
        account.free.sealed + freed.sealed - need.sealed - account.reserve,
    )
    return Promise(demand.request.request_id, group.name, at, spare)
