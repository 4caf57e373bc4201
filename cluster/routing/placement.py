"""The choice of a group: a function of what is free and what is asked, without effects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvmesh.cluster.routing.demand import Demand
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.pace import Backlog
from kvmesh.cluster.routing.timeline import Timeline
from kvmesh.cluster.routing.verdict import Reason, Row, Verdicts
from kvmesh.workers.sizes import PageNeed


@dataclass(slots=True)
class GroupView:
    """A group as placement sees it; the router keeps it current.

    shape: index of its shape among the demands
    account: of the ledger; None while the group is down
    decode_step_s: time between two tokens of a sequence, a moving average
    """

    spec: GroupSpec
    shape: int
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
class Asked:
    """What is asked of the groups.

    demands: by shape
    prompt_tokens: of one sequence
    page_hashes: of the prompt's full pages
    cached_pages: by group, of the prompt; groups without any may be missing
    decode_tokens, leased_tokens: output expected of one sequence; that its lease covers
    """

    request_id: str
    demands: Sequence[Demand]
    prompt_tokens: int
    decode_tokens: int
    leased_tokens: int
    sequences: int = 1
    min_quality: float | None = None
    excluded_groups: frozenset[str] = frozenset()
    page_hashes: tuple[bytes, ...] = ()
    cached_pages: Mapping[str, int] = field(default_factory=dict)

    def cached_tokens(self, view: GroupView) -> int:
        """Of the prompt; its last token is computed in any case."""
        pages = self.cached_pages.get(view.spec.group, 0)
        return min(pages * view.spec.geometry.page_size, self.prompt_tokens - 1)


@dataclass(frozen=True, slots=True)
class PlacementRules:
    """What placement weighs, in seconds of time to first token.

    ahead_s: prompts are given to a group only while it has less than this to
        compute before them; later decisions know more
    balance_s: what a full group costs over an empty one: its decoding is slower
    hole_s: what a small request costs on the group whose room large ones need
    hole_pages: sealed pages that shall stay free together somewhere, if they can
    """

    ahead_s: float = math.inf
    balance_s: float = 0.5
    hole_s: float = 0.25
    hole_pages: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """group: where the request goes, or None; verdicts: one for each group, in order."""

    group: str | None
    verdicts: Verdicts

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
) -> Choice:
    """The group of least cost among those that can take the request now.

    Cost is the projected time to the first token there, less what a cached prefix
    spares, plus what the request does to others: the fuller the group the more, and
    more yet where it would break the hole kept for large requests.
    O(groups), besides the pages that groups share.
    """
    rows: list[Row] = []
    best = -1
    best_cost = math.inf
    for view in views:
        reason = obstacle(view, asked, now, rules, promise)
        cost = None
        if reason is None:
            reason = Reason.WORSE
            cost = _cost_s(view, asked, now, rules)
            if cost < best_cost:
                best, best_cost = len(rows), cost
        rows.append(_row(view, asked, reason, cost))
    if best < 0:
        return Choice(None, Verdicts(rows))
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
    spec, account, demand = view.spec, view.account, asked.demands[view.shape]
    if asked.min_quality is not None and spec.quality < asked.min_quality:
        return Reason.QUALITY
    if demand.total_tokens > spec.max_model_len:
        return Reason.CONTEXT
    if asked.sequences > spec.max_sequences:
        return Reason.SEQUENCES
    if not demand.most.fits(spec.capacity):
        return Reason.PAGES
    if spec.group in asked.excluded_groups:
        return Reason.EXCLUDED
    if account is None:
        return Reason.DOWN
    if account.reported_at is None:
        return Reason.UNREPORTED
    if account.sequences + asked.sequences > spec.max_sequences:
        return Reason.BUSY
    if not _fits(account, asked, demand):
        return Reason.FULL
    if _behind(view, asked, now, rules):
        return Reason.BACKLOG
    if promise is not None and promise.group == spec.group:
        return _breach(view, asked, now, promise)
    return None


def sealed_hashes(asked: Asked, view: GroupView) -> tuple[bytes, ...]:
    """Of the prompt's pages, those the group stores sealed: equal ones are stored once."""
    sealed = view.spec.geometry.sealed_range(asked.prompt_tokens)
    return asked.page_hashes[sealed.start : sealed.stop]


def projected_s(view: GroupView, asked: Asked, now: float) -> float:
    """How long the request would hold its lease on the group."""
    decode_s = asked.decode_tokens * view.decode_step_s
    return view.backlog.seconds(now) + _prefill_s(view, asked) + decode_s


def _fits(account: Account, asked: Asked, demand: Demand) -> bool:
    to_grow = demand.most.sealed - demand.leased.sealed
    if account.holds(demand.leased, to_grow):
        return True
    if not account.shared or not asked.page_hashes:
        return False
    sealed = account.spec.geometry.sealed_range(asked.prompt_tokens)
    shared = account.shared_pages(asked.page_hashes[sealed.start : sealed.stop])
    return account.holds(demand.leased, to_grow, shared)


def _behind(view: GroupView, asked: Asked, now: float, rules: PlacementRules) -> bool:
    """Whether too much is to be computed there first, even for the time a cached prefix spares."""
    backlog_s = view.backlog.seconds(now)
    if backlog_s <= rules.ahead_s:
        return False
    if view.spec.group not in asked.cached_pages:
        return True
    backlog = view.backlog
    whole_s = backlog.pace.prefill_s(asked.prompt_tokens) * backlog.correction
    return backlog_s > rules.ahead_s + whole_s - _prefill_s(view, asked)


def _breach(view: GroupView, asked: Asked, now: float, promise: Promise) -> Reason | None:
    """PROMISED if the request would hold pages that the promise needs."""
    if promise.request_id == asked.request_id:
        return None
    if asked.demands[view.shape].leased.fits(promise.spare):
        return None
    if now + projected_s(view, asked, now) <= promise.at:
        return None
    return Reason.PROMISED


def _prefill_s(view: GroupView, asked: Asked) -> float:
    """Time to compute what is not cached of the prompt."""
    cached, backlog = asked.cached_tokens(view), view.backlog
    return backlog.pace.prefill_s(asked.prompt_tokens - cached, cached) * backlog.correction


def _cost_s(view: GroupView, asked: Asked, now: float, rules: PlacementRules) -> float:
    account, backlog = view.account, view.backlog
    assert account is not None
    capacity = view.spec.capacity.sealed or 1
    leased = asked.demands[view.shape].leased.sealed
    left = account.free_sealed - leased
    cost = backlog.seconds(now) + _prefill_s(view, asked)
    cost += rules.balance_s * (1.0 - left / capacity)
    if left < rules.hole_pages <= account.free_sealed and leased < rules.hole_pages:
        cost += rules.hole_s
    return cost


def _row(view: GroupView, asked: Asked, reason: Reason, cost: float | None) -> Row:
    demand, account = asked.demands[view.shape], view.account
    cached = asked.cached_pages.get(view.spec.group, 0)
    if account is None:
        return (view.spec, reason, demand.most, 0, 0, cached, cost)
    needed = demand.leased if reason is not Reason.PAGES else demand.most
    return (view.spec, reason, needed, account.free_hot, account.free_sealed, cached, cost)
