"""When a request could start, by what is expected of the leases that run.

A request that lacks pages is promised the group that has them soonest. Others may overtake
where they do not delay it: EASY backfilling (Lifka 1995).
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.placement import Promise, lasting_obstacle
from kvmesh.workers.sizes import PageNeed


def earliest_start(groups: Iterable[Group], demand: RequestDemand, now: float) -> float | None:
    """The soonest any group has the pages and starts on the prompt, were it first in line."""
    starts = (max(at, now + x.backlog.seconds(now)) for at, x in _rooms(groups, demand, now))
    return min(starts, default=None)


def promise(groups: Iterable[Group], demand: RequestDemand, now: float) -> Promise | None:
    """The pages of the group that has enough soonest; None if one has them already, or never."""
    rooms = _rooms(groups, demand, now)
    at, group = min(rooms, key=lambda room: room[0], default=(now, None))
    if group is None or at <= now:
        return None
    account, need = group.account, demand.by_kind[group.kind].leased
    assert account is not None
    freed = group.timeline.freed_by(at, now)
    spare = PageNeed(
        account.free.hot + freed.hot - need.hot,
        account.free.sealed + freed.sealed - need.sealed - account.reserve,
    )
    return Promise(demand.request.request_id, group.name, at, spare)


def _rooms(groups: Iterable[Group], demand: RequestDemand, now: float) -> list[tuple[float, Group]]:
    """Groups that will hold the request, and when, if nothing else is admitted."""
    rooms: list[tuple[float, Group]] = []
    for group in groups:
        if lasting_obstacle(group, demand) is None:
            at = _room_at(group, demand, now)
            if at is not None:
                rooms.append((at, group))
    return rooms


def _room_at(group: Group, demand: RequestDemand, now: float) -> float | None:
    account, here = group.account, demand.by_kind[group.kind]
    assert account is not None
    reserve = max(account.reserve, here.to_grow)
    free = PageNeed(account.free.hot, account.free.sealed - reserve)
    at = group.timeline.room_at(here.leased, free, now)
    beyond = account.sequences + demand.request.sequences - group.info.max_num_seqs
    if at is None or beyond <= 0:
        return at
    return max(at, group.timeline.nth_end(beyond, now))
