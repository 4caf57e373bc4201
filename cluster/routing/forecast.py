"""When a request could start, by what is expected of the leases that run."""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.cluster.routing.events import Lease
from kvmesh.cluster.routing.placement import Asked, GroupView, Promise
from kvmesh.cluster.routing.verdict import NEVER, Reason, Verdicts
from kvmesh.workers.sizes import PageNeed

# Obstacles that the ends of leases and of prompts remove.
PASSING = frozenset({Reason.FULL, Reason.BUSY, Reason.BACKLOG, Reason.PROMISED})


def room_at(view: GroupView, asked: Asked, leases: Mapping[str, Lease], now: float) -> float | None:
    """When the group's pages hold the request, if nothing else is admitted; None if never."""
    account = view.account
    if account is None:
        return None
    demand = asked.plans[view.kind].demand
    reserve = max(account.reserve, demand.most.sealed - demand.leased.sealed)
    free = PageNeed(account.free_hot, account.free_sealed - reserve)
    at = view.timeline.room_at(demand.leased, free, leases, now)
    beyond = account.sequences + asked.sequences - view.spec.max_sequences
    if at is None or beyond <= 0:
        return at
    return max(at, view.timeline.nth_end(beyond, now))


def best_promise(
    views: Mapping[str, GroupView],
    asked: Asked,
    verdicts: Verdicts,
    leases: Mapping[str, Lease],
    now: float,
) -> Promise | None:
    """The group whose pages hold the request first, and what else they hold then."""
    best: tuple[float, GroupView] | None = None
    for verdict in verdicts:
        if verdict.reason not in PASSING or (view := views.get(verdict.group)) is None:
            continue
        at = room_at(view, asked, leases, now)
        if at is not None and (best is None or at < best[0]):
            best = (at, view)
    return None if best is None else promise_on(best[1], asked, leases, best[0], now)


def promise_on(
    view: GroupView, asked: Asked, leases: Mapping[str, Lease], at: float, now: float
) -> Promise:
    """A promise of the group's pages from `at` on."""
    account, need = view.account, asked.leased(view)
    assert account is not None
    freed = view.timeline.freed_by(at, leases, now)
    spare = PageNeed(
        account.free_hot + freed.hot - need.hot,
        account.free_sealed + freed.sealed - need.sealed - account.reserve,
    )
    return Promise(asked.request_id, view.spec.group, at, spare)


def earliest_start(
    views: Mapping[str, GroupView],
    asked: Asked,
    verdicts: Verdicts,
    leases: Mapping[str, Lease],
    now: float,
) -> float | None:
    """The soonest any group has the pages and begins with the prompt, were it first in line."""
    starts: list[float] = []
    for verdict in verdicts:
        view = views.get(verdict.group)
        if view is None or verdict.reason in NEVER or verdict.reason is Reason.EXCLUDED:
            continue
        at = room_at(view, asked, leases, now)
        if at is not None:
            starts.append(max(at, now + view.backlog.seconds(now)))
    return min(starts, default=None)
