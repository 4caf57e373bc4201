"""The choice of a group: a function of what is free and what is asked, without effects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvmesh.cluster.routing.account import Account
from kvmesh.cluster.routing.demand import Demand
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.pace import Backlog
from kvmesh.cluster.routing.timeline import Timeline
from kvmesh.cluster.routing.verdict import Reason, Row, Verdicts
from kvmesh.workers.sizes import PageNeed


@dataclass(slots=True, eq=False)
class GroupView:
    """A group as placement sees it; the router keeps it current.

    kind: index of its kind among the plans
    account: of the ledger; None while the group is down
    decode_step_s: time between two tokens of a sequence, a moving average
    """

    spec: GroupSpec
    kind: int
    account: Account | None
    backlog: Backlog
    timeline: Timeline
    decode_step_s: float = 0.0

    def __post_init__(self) -> None:
        self.decode_step_s = self.decode_step_s or self.spec.pace.decode_step_s

    def learn_step(self, seconds: float, weight: float) -> None:
        """A sequence took `seconds` for each token of its output."""
        self.decode_step_s += weight * (seconds - self.decode_step_s)

    @property
    def up(self) -> bool:
        return self.account is not None

    @property
    def reported(self) -> bool:
        return self.account is not None and self.account.reported_at is not None

    @property
    def sequences(self) -> int:
        return 0 if self.account is None else self.account.sequences

    @property
    def used(self) -> PageNeed:
        return PageNeed(0, 0) if self.account is None else self.account.used


@dataclass(frozen=True, slots=True)
class Promise:
    """Pages of a group promised to a waiting request from some time on.

    spare: pages free at that time besides; a lease that ends later may use them
    """

    request_id: str
    group: str
    at: float
    spare: PageNeed


@dataclass(frozen=True, slots=True)
class Plan:
    """A request on groups of one kind.

    never: why such a group could not take it even when empty
    num_blocks: of the prompt's blocks, how many end up sealed
    prefill_s: to compute the whole prompt, uncorrected
    """

    demand: Demand
    never: Reason | None
    num_blocks: int
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of the groups.

    plans: by kind
    prompt_tokens: of one sequence
    decode_tokens, leased_tokens: output expected of one sequence; that its lease covers
    blocks: hashes of the prompt's runs of `block_pages` pages
    cached_blocks: by group, how many of them it holds; groups without any may be missing
    """

    request_id: str
    plans: Sequence[Plan]
    prompt_tokens: int
    decode_tokens: int
    leased_tokens: int
    sequences: int = 1
    resumed: bool = False
    excluded_groups: frozenset[str] = frozenset()
    blocks: tuple[bytes, ...] = ()
    block_pages: int = 1
    cached_blocks: Mapping[str, int] = field(default_factory=dict)

    def leased(self, view: GroupView) -> PageNeed:
        return self.plans[view.kind].demand.leased

    def cached_tokens(self, view: GroupView) -> int:
        """Of the prompt; its last token is computed in any case."""
        blocks = self.cached_blocks.get(view.spec.group, 0)
        tokens = blocks * self.block_pages * view.spec.geometry.page_size
        return min(tokens, self.prompt_tokens - 1)

    def sealed_blocks(self, view: GroupView) -> tuple[bytes, ...]:
        """Of the prompt's blocks, those the group will store sealed: equal ones but once."""
        return self.blocks[: self.plans[view.kind].num_blocks]


@dataclass(frozen=True, slots=True)
class PlacementRules:
    """What placement weighs, in seconds of time to first token.

    ahead_s: prompts are given to a group only while it has less than this to
        compute before them; later decisions know more
    balance_s: what a full group costs over an empty one: its decoding is slower
    hole_s: what a small request costs on the group whose room large ones need
    hole_pages: sealed pages that shall stay free together somewhere, if they can
    longest_s: prompts that take longer to compute are not begun with at present
    scarcity: what a second of computing costs; more than one where requests wait for it
    """

    ahead_s: float = math.inf
    balance_s: float = 0.5
    hole_s: float = 0.25
    hole_pages: int = 0
    longest_s: float = math.inf
    scarcity: float = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """group: where the request goes, or None; verdicts: one for each group, in order.

    better_later: the group worth waiting for, where that is why there is none now
    """

    group: str | None
    verdicts: Verdicts
    better_later: str | None = None

    @property
    def never(self) -> bool:
        """True if no group could take the request however long it waited."""
        return self.verdicts.never


def choose(
    views: Iterable[GroupView],
    asked: Asked,
    now: float,
    rules: PlacementRules,
    promise: Promise | None = None,
    deferred_s: Mapping[str, float] | None = None,
) -> Choice:
    """The group of least cost among those that can take the request now.

    deferred_s: by group, the computing that waits for it already; where this is given,
        no group is chosen if it costs less to wait for one that holds the prefix

    Cost is the projected time to the first token there, less what a cached prefix
    spares, plus what the request does to others: the fuller the group the more, and
    more yet where it would break the hole kept for large requests.
    O(groups), besides the pages that groups share.
    """
    rows: list[Row] = []
    best = later = -1
    best_cost = later_cost = math.inf
    worse, plans = Reason.WORSE, asked.plans
    for view in views:
        cost = _plain_cost_s(view, asked, now, rules, promise)
        if cost is not None:
            if cost < best_cost:
                best, best_cost = len(rows), cost
            account: Account = view.account  # type: ignore[assignment]  # plain, so it has one
            leased = plans[view.kind].demand.leased
            rows.append((view.spec, worse, leased, account.free_hot, account.free_sealed, 0, cost))
            continue
        found = obstacle(view, asked, now, rules, promise)
        reason = found or worse
        if found is None:
            cost = _cost_s(view, asked, now, rules)
        if cost is not None:
            if cost < best_cost:
                best, best_cost = len(rows), cost
        elif (
            reason is Reason.BACKLOG
            and deferred_s is not None
            and view.spec.group in asked.cached_blocks
        ):
            cost = _cost_s(view, asked, now, rules) + deferred_s.get(view.spec.group, 0.0)
            if cost < later_cost:
                later, later_cost = len(rows), cost
        rows.append(_row(view, asked, reason, cost))
    if best < 0 or later_cost < best_cost:
        better_later = rows[later][0].group if later >= 0 else None
        return Choice(None, Verdicts(rows), better_later)
    chosen = rows[best]
    rows[best] = (chosen[0], Reason.CHOSEN, *chosen[2:])
    return Choice(chosen[0].group, Verdicts(rows))


def obstacle(
    view: GroupView,
    asked: Asked,
    now: float,
    rules: PlacementRules,
    promise: Promise | None = None,
) -> Reason | None:
    """Why the group cannot take the request now, or None if it can."""
    plan, account = asked.plans[view.kind], view.account
    if plan.never is not None:
        return plan.never
    if asked.excluded_groups and view.spec.group in asked.excluded_groups:
        return Reason.EXCLUDED
    if account is None:
        return Reason.DOWN
    if account.reported_at is None:
        return Reason.UNREPORTED
    if account.sequences + asked.sequences > view.spec.max_sequences:
        return Reason.BUSY
    if plan.prefill_s > rules.longest_s:
        return Reason.LONG
    demand = plan.demand
    to_grow = demand.most.sealed - demand.leased.sealed
    if not account.holds(demand.leased, to_grow):
        shared = account.shared_pages(asked.sealed_blocks(view), asked.block_pages)
        if not shared or not account.holds(demand.leased, to_grow, shared):
            return Reason.FULL
    backlog = view.backlog
    if backlog.clear_at - now > rules.ahead_s or backlog.behind_s > rules.ahead_s:
        spared_s = 0.0
        if view.spec.group in asked.cached_blocks:  # worth waiting for, as long as it spares
            spared_s = plan.prefill_s * backlog.correction - prefill_s(view, asked)
        if backlog.seconds(now) > rules.ahead_s + spared_s:
            return Reason.BACKLOG
    if promise is not None and promise.group == view.spec.group:
        return _breach(view, asked, now, promise)
    return None


def projected_s(view: GroupView, asked: Asked, now: float) -> float:
    """How long the request would hold its lease on the group."""
    decode_s = asked.decode_tokens * view.decode_step_s
    return view.backlog.seconds(now) + prefill_s(view, asked) + decode_s


def _breach(view: GroupView, asked: Asked, now: float, promise: Promise) -> Reason | None:
    """PROMISED if the request would hold pages that the promise needs."""
    if promise.request_id == asked.request_id:
        return None
    if asked.leased(view).fits(promise.spare):
        return None
    if now + projected_s(view, asked, now) <= promise.at:
        return None
    return Reason.PROMISED


def prefill_s(view: GroupView, asked: Asked) -> float:
    """Time to compute what is not cached of the prompt."""
    backlog = view.backlog
    if view.spec.group not in asked.cached_blocks:
        return asked.plans[view.kind].prefill_s * backlog.correction
    cached = asked.cached_tokens(view)
    return backlog.pace.prefill_s(asked.prompt_tokens - cached, cached) * backlog.correction


def _plain_cost_s(
    view: GroupView,
    asked: Asked,
    now: float,
    rules: PlacementRules,
    promise: Promise | None,
) -> float | None:
    """The cost where nothing is special about the group and it can take the request; else None.

    The same as no `obstacle` and `_cost_s`, in one function: most groups of a large
    fleet are plain, and this is what a decision's time goes into.
    """
    account, plan, spec = view.account, asked.plans[view.kind], view.spec
    group = spec.group
    if (
        account is None
        or account.reported_at is None
        or plan.never is not None
        or plan.prefill_s > rules.longest_s
        or promise is not None
        or group in asked.cached_blocks
        or group in asked.excluded_groups
        or account.sequences + asked.sequences > spec.max_sequences
    ):
        return None
    demand, backlog = plan.demand, view.backlog
    leased, free = demand.leased, account.free_sealed
    left = free - leased.sealed
    wait_s = backlog.clear_at - now
    if wait_s < backlog.behind_s:
        wait_s = backlog.behind_s
    if (
        left < account.reserve
        or left < demand.most.sealed - leased.sealed
        or leased.hot > account.free_hot
        or wait_s > rules.ahead_s
    ):
        return None
    cost = wait_s + rules.scarcity * plan.prefill_s * backlog.correction
    capacity, left_hot = spec.capacity, account.free_hot - leased.hot
    share, hot_share = left / (capacity.sealed or 1), left_hot / (capacity.hot or 1)
    cost += rules.balance_s * (1.0 - (hot_share if hot_share < share else share))
    if left < rules.hole_pages <= free and leased.sealed < rules.hole_pages:
        cost += rules.hole_s
    return cost


def _used_share(account: Account, leased: PageNeed) -> float:
    """Of the group's pages, with the request: of the kind that it runs out of first.

    Short sequences hold hot pages alone; by sealed ones a group of them looks empty.
    """
    capacity = account.spec.capacity
    sealed_left = (account.free_sealed - leased.sealed) / (capacity.sealed or 1)
    hot_left = (account.free_hot - leased.hot) / (capacity.hot or 1)
    return 1.0 - min(sealed_left, hot_left)


def _cost_s(view: GroupView, asked: Asked, now: float, rules: PlacementRules) -> float:
    account, backlog = view.account, view.backlog
    assert account is not None
    free = account.free_sealed
    leased = asked.plans[view.kind].demand.leased.sealed
    left = free - leased
    wait_s = backlog.clear_at - now
    if wait_s < backlog.behind_s:
        wait_s = backlog.behind_s
    used_share = _used_share(account, asked.plans[view.kind].demand.leased)
    cost = wait_s + rules.scarcity * prefill_s(view, asked) + rules.balance_s * used_share
    if left < rules.hole_pages <= free and leased < rules.hole_pages:
        cost += rules.hole_s
    return cost


def _row(view: GroupView, asked: Asked, reason: Reason, cost: float | None) -> Row:
    demand, account = asked.plans[view.kind].demand, view.account
    spec = view.spec
    cached = asked.cached_blocks.get(spec.group, 0) * asked.block_pages
    if account is None:
        return (spec, reason, demand.most, 0, 0, cached, cost)
    needed = demand.leased if reason is not Reason.PAGES else demand.most
    return (spec, reason, needed, account.free_hot, account.free_sealed, cached, cost)
