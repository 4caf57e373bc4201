"""The choice of a group: a function of what is free and what is asked, without effects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.group import NO_PAGES, Group
from kvmesh.cluster.routing.live import Lease
from kvmesh.cluster.routing.verdict import Reason, Row, Verdicts
from kvmesh.workers.sizes import PageNeed


@dataclass(frozen=True, slots=True)
class Promise:
    """Pages of a group promised to a waiting request from some time on.

    spare: pages free at that time besides; a lease that ends later may use them
    """

    request_id: str
    group: str
    at: float
    spare: PageNeed

    def after_grant(self, lease: Lease) -> Promise:
        """The promise once another request has got this lease on the group."""
        return self if lease.ends_at <= self.at else replace(self, spare=self.spare - lease.need)


NO_PROMISES: Mapping[str, Promise] = {}


@dataclass(frozen=True, slots=True)
class PlacementWeights:
    """What placement weighs, in seconds of time to first token.

    ahead_s: prompts are given to a group only while it has less than this to
        compute before them; later decisions know more
    balance_s: what a full group costs over an empty one: its decoding is slower
    longest_s: prompts that take longer to compute do not start at present
    quota_left: bytes that the request's tenant may lease at present
    """

    ahead_s: float
    balance_s: float
    longest_s: float = math.inf
    quota_left: float = math.inf


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """group: where the request goes, or None; verdicts: one for each group, in order

    better_later: the group worth waiting for, where that is why there is none now
    """

    group: Group | None
    verdicts: Verdicts
    better_later: Group | None = None


def choose(
    groups: Iterable[Group],
    demand: RequestDemand,
    now: float,
    weights: PlacementWeights,
    promises: Mapping[str, Promise] = NO_PROMISES,
    deferred_s: Mapping[str, float] | None = None,
) -> GroupChoice:
    """The group of lowest cost among those that can take the request now.

    deferred_s: by group, the computing that waits for it already; where this is given,
        no group is chosen if it costs less to wait for one that holds the prefix

    Cost is the projected time to the first token there, less what a cached prefix
    saves, plus what the request does to others: the fuller the group the more.
    O(groups), besides the pages that groups share.
    """
    rows: list[Row] = []
    best: Group | None = None
    later: Group | None = None
    best_row, best_cost, later_cost = -1, math.inf, math.inf
    for group in groups:
        wait_s, cost = group.backlog.seconds(now), None
        reason = _obstacle(group, demand, wait_s, now, weights, promises.get(group.name))
        if reason is None:
            reason, cost = Reason.WORSE, _cost_s(group, demand, wait_s, weights)
            if cost < best_cost:
                best, best_cost, best_row = group, cost, len(rows)
        elif (
            reason is Reason.BACKLOG
            and deferred_s is not None
            and group.name in demand.cached_blocks
        ):
            deferred = deferred_s.get(group.name, 0.0)
            cost = _cost_s(group, demand, wait_s, weights) + deferred
            if cost < later_cost:
                later, later_cost = group, cost
        rows.append(_row(group, demand, reason, cost))
    if best is None or later_cost < best_cost:
        return GroupChoice(None, Verdicts(tuple(rows)), later)
    name, info, _, need, free, cached, cost = rows[best_row]
    rows[best_row] = (name, info, Reason.CHOSEN, need, free, cached, cost)
    return GroupChoice(best, Verdicts(tuple(rows)))


def never_taken(group: Group, demand: RequestDemand) -> Reason | None:
    """Why the group could not take the request even when empty, or None."""
    if (never := demand.by_kind[group.kind].never) is not None:
        return never
    return Reason.FORMAT if demand.request.accepts.why_not(group.info) else None


def lasting_obstacle(group: Group, demand: RequestDemand) -> Reason | None:
    """Why the group does not take the request, where no lease's end would change it."""
    if (never := never_taken(group, demand)) is not None:
        return never
    if group.account is None or group.info.epoch in demand.request.lost_engines:
        return Reason.DOWN
    return Reason.DRAINING if group.draining else None


def lease_bytes(group: Group, demand: RequestDemand) -> int:
    """What the request's lease takes there at first, over all ranks."""
    leased, sequences = demand.by_kind[group.kind].leased, demand.request.sequences
    return group.info.geometry.bytes_of(leased, sequences)


def _obstacle(
    group: Group,
    demand: RequestDemand,
    wait_s: float,
    now: float,
    weights: PlacementWeights,
    promise: Promise | None,
) -> Reason | None:
    """Why the group cannot take the request now, or None if it can. wait_s: its backlog"""
    reason = lasting_obstacle(group, demand)
    if reason is not None:
        return reason
    here, account, request = demand.by_kind[group.kind], group.account, demand.request
    assert account is not None
    if weights.quota_left < math.inf and lease_bytes(group, demand) > weights.quota_left:
        return Reason.QUOTA
    if account.sequences + request.sequences > group.info.max_num_seqs:
        return Reason.BUSY
    if demand.prefill_s > weights.longest_s:
        return Reason.LONG
    if not account.holds(here.leased, here.to_grow):
        shared = account.blocks.shared_pages(demand.sealed_blocks(group.kind))
        if not shared or not account.holds(here.leased, here.to_grow, shared):
            return Reason.FULL
    if wait_s > weights.ahead_s:
        saved_s = 0.0
        if group.name in demand.cached_blocks:  # worth waiting for, as long as it saves
            saved_s = demand.prefill_s * group.backlog.correction - prefill_s(group, demand)
        if wait_s > weights.ahead_s + saved_s:
            return Reason.BACKLOG
    if promise is not None:
        return _breach(group, demand, now, promise)
    return None


def prefill_s(group: Group, demand: RequestDemand) -> float:
    """Time to compute what is not cached of the prompt."""
    backlog = group.backlog
    if group.name not in demand.cached_blocks:
        return demand.prefill_s * backlog.correction
    cached = demand.cached_tokens(group.name, group.info.geometry.page_size)
    new = demand.request.prompt_tokens - cached
    return backlog.pace.prefill_s(new, cached) * backlog.correction


def projected_s(group: Group, demand: RequestDemand, now: float) -> float:
    """How long the request would hold its lease on the group."""
    decode_s = demand.leased_tokens * group.decode_step_s
    return group.backlog.seconds(now) + prefill_s(group, demand) + decode_s


def _breach(group: Group, demand: RequestDemand, now: float, promise: Promise) -> Reason | None:
    """PROMISED if the request would hold pages that the promise needs."""
    if promise.request_id == demand.request.request_id:
        return None
    if demand.by_kind[group.kind].leased.fits(promise.spare):
        return None
    if now + projected_s(group, demand, now) <= promise.at:
        return None
    return Reason.PROMISED


def _cost_s(group: Group, demand: RequestDemand, wait_s: float, weights: PlacementWeights) -> float:
    account, leased = group.account, demand.by_kind[group.kind].leased
    assert account is not None
    free, capacity = account.free, group.info.capacity
    # The scarcer kind of page counts. Short sequences hold hot pages alone; by sealed
    # ones, a group of them looks empty.
    sealed, hot = free.sealed - leased.sealed, free.hot - leased.hot
    used_share = 1.0 - min(sealed / (capacity.sealed or 1), hot / (capacity.hot or 1))
    return wait_s + prefill_s(group, demand) + weights.balance_s * used_share


def _row(group: Group, demand: RequestDemand, reason: Reason, cost: float | None) -> Row:
    here, account = demand.by_kind[group.kind], group.account
    cached = demand.cached_blocks.get(group.name, 0) * demand.block_pages
    if account is None:
        return (group.name, group.info, reason, here.max, NO_PAGES, cached, cost)
    need = here.max if reason is Reason.PAGES else here.leased
    return (group.name, group.info, reason, need, account.free, cached, cost)
