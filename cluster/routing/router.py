"""The router's core: synchronous, deterministic, told the time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    DuplicateRequestError,
)
from kvmesh.cluster.routing.events import Event, Lease
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.ledger import Ledger, Reconciliation
from kvmesh.cluster.routing.occupancy import Occupancy
from kvmesh.cluster.routing.placement import (
    Asked,
    Choice,
    GroupView,
    PlacementRules,
    Promise,
    choose,
    prefill_s,
)
from kvmesh.cluster.routing.prefix_index import PrefixIndex
from kvmesh.cluster.routing.promised import PromisedStart
from kvmesh.cluster.routing.queue import Waiting, WaitingQueue
from kvmesh.cluster.routing.refusals import Refusals
from kvmesh.cluster.routing.request import (
    Decision,
    Estimate,
    Granted,
    Growth,
    Outcome,
    PlaceRequest,
    Queued,
    Refused,
)
from kvmesh.workers.request import EngineLoads

FRESH_S = 0.5
SCARCITY_MOST = 4.0
HOLE_MEMORY = 0.999  # how slowly the greatest demand seen is forgotten, a request


@dataclass(frozen=True, slots=True)
class Changes:
    """What a call set in motion, besides its own answer.

    outcomes: waiting requests that were granted or refused by it
    voided: leases whose group is gone; their requests must be placed again
    """

    outcomes: tuple[Outcome, ...] = ()
    voided: tuple[Lease, ...] = ()


class Router:
    """Admits requests to groups so that leases never exceed what a group holds.

    epoch: greater than any former router's, e.g. the time of its start
    expected_groups: those that may hold leases of a former router; until they
        have reported, or `rebuild_timeout_s` is over, every request waits
    """

    def __init__(
        self,
        config: RouterConfig,
        epoch: int,
        now: float,
        *,
        expected_groups: Collection[str] = (),
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.config = config
        self._fleet = Fleet(config, epoch, on_event)
        self._queue = WaitingQueue(config.queue_limit, config.patience_most_s)
        self._known: dict[str, tuple[float, Asked]] = {}
        self._promised = PromisedStart(self._queue)
        self._refusals = Refusals(config, self._fleet)
        self._unheard = set(expected_groups)
        self._rebuild_until = now + config.rebuild_timeout_s
        self._rules = PlacementRules(config.ahead_s, config.balance_s, config.hole_s)
        self._occupancy = Occupancy(config.long_s, config.busy_most)
        self._hole_pages = 0.0
        self._grants = 0

    # Requests

    def submit(self, request: PlaceRequest, now: float) -> tuple[Decision, Changes]:
        """Place the request, queue it, or refuse it with the reason.

        Raises DuplicateRequestError if the id already waits.
        """
        if request.request_id in self._queue:
            raise DuplicateRequestError(request.request_id)
        self._occupancy.note_arrival(self._fleet.views.values(), now)
        asked = self._fleet.ask(request)
        choice = self._choose(asked, self._fleet.views.values(), now)
        if self.ready(now):
            error = self._refusals.hopeless(request, asked, choice, len(self._queue), now)
            if error is not None:
                return Refused(request.request_id, error, choice.verdicts), Changes()
            if not len(self._queue) and choice.group is not None and self._in_quota(request, asked):
                return self._grant(request, asked, choice, now, now), Changes()
        if self._queue.full:
            full = self._refusals.queue_full(asked, choice, len(self._queue), now)
            return Refused(request.request_id, full, choice.verdicts), Changes()
        self._enqueue(request, now)
        return self._wait_for(request, asked, choice, self._admit(now), now)

    def cancel(self, request_id: str, now: float) -> Changes:
        """Take a waiting request out of the queue, if it is there."""
        self._dequeue(request_id)
        return Changes(self._admit(now))

    def begun(self, lease_id: str, now: float) -> Changes:
        """The lease's sequence has emitted its first token: its prompt is computed."""
        self._fleet.begun(lease_id, now)
        return Changes(self._admit(now))

    def grow(
        self, lease_id: str, request: PlaceRequest, output_tokens: int, now: float
    ) -> Growth | None:
        """Extend a lease before a sequence of it goes on to `output_tokens`.

        request: as it was placed. Returns None if the sequence must wait for pages, or
        the lease is gone.
        """
        return self._fleet.grow(lease_id, request, output_tokens, now)

    def release(self, lease_id: str, now: float, output_tokens: int | None = None) -> Changes:
        """End a lease; a second time changes nothing.

        output_tokens: of one sequence, if it ended of its own accord, to learn from
        """
        lease = self._fleet.release(lease_id, now, output_tokens)
        return Changes() if lease is None else Changes(self._admit(now))

    def estimate(self, request: PlaceRequest, now: float) -> Estimate:
        """What would become of the request, without submitting it."""
        asked = self._fleet.ask(request)
        choice = self._choose(asked, self._fleet.views.values(), now)
        fits_now = choice.group is not None and not len(self._queue) and self.ready(now)
        start = (
            0.0
            if fits_now
            else self._refusals.projected_start_s(asked, choice, len(self._queue), now)
        )
        return Estimate(
            request_id=request.request_id,
            fits_ever=not choice.never,
            fits_now=fits_now,
            group=choice.group if fits_now else None,
            needed_bytes={verdict.group: verdict.needed_bytes for verdict in choice.verdicts},
            projected_start_s=None if choice.never else start,
            queue_depth=len(self._queue),
            verdicts=choice.verdicts,
        )

    # Groups

    def group_up(self, spec: GroupSpec, now: float) -> Changes:
        """A group's engine is there. It takes requests from its first report on."""
        self._known.clear()
        voided = self._fleet.group_up(spec, now)
        return Changes(self._admit(now), voided)

    def group_down(self, group: str, now: float, *, gone: bool = False) -> Changes:
        """A group's engine is lost; `gone` if it will not come back.

        What only this group could hold waits for its return, unless it is gone.
        """
        voided = self._fleet.group_down(group, now, gone)
        self._promised.group_down(group)
        if not gone:
            return Changes(self._admit(now), voided)
        self._unheard.discard(group)
        hopeless = tuple(self._refuse_hopeless(now))
        return Changes(hopeless + self._admit(now), voided)

    def report(self, group: str, loads: EngineLoads, now: float) -> tuple[Reconciliation, Changes]:
        """An engine's account of what it runs; the ledger follows it."""
        reconciled = self._fleet.report(group, loads, now)
        if not reconciled.stale:
            self._unheard.discard(group)
        return reconciled, Changes(self._admit(now))

    def pages_changed(
        self, group: str, sealed: Iterable[bytes], evicted: Iterable[bytes], now: float
    ) -> None:
        """An engine's prefix cache gained and lost pages with these hashes."""
        self._fleet.index.add(group, sealed)
        self._fleet.index.remove(group, evicted)

    def tick(self, now: float) -> Changes:
        """What time alone brings: deadlines, drained backlogs, the end of a rebuild."""
        self.ledger.forget(now)
        overdue = tuple(self._expire(waiting.request) for waiting in self._queue.overdue(now))
        return Changes(overdue + self._admit(now))

    # Reading

    @property
    def ledger(self) -> Ledger:
        return self._fleet.ledger

    @property
    def page_index(self) -> PrefixIndex:
        return self._fleet.index

    @property
    def queue_depth(self) -> int:
        return len(self._queue)

    @property
    def promise(self) -> Promise | None:
        """What the longest-waiting request that lacks pages has been promised."""
        return self._promised.current

    def ready(self, now: float) -> bool:
        """Whether requests are admitted, and not held until the groups have reported."""
        return not self._unheard or now >= self._rebuild_until

    def views(self) -> tuple[GroupView, ...]:
        """Every known group as placement sees it."""
        return tuple(self._fleet.views.values())

    # Deciding

    def _choose(
        self, asked: Asked, views: Iterable[GroupView], now: float, *, above: bool = False
    ) -> Choice:
        """above: the request stands above the one that has been promised a start."""
        promise = None if above else self._promised.current
        return choose(views, asked, now, self._rules_for(asked), promise)

    def _rules_for(self, asked: Asked) -> PlacementRules:
        """Long prompts may have to wait; not those that have lost their group."""
        long_s = self.config.long_s
        if asked.resumed:
            return self._rules
        if any(plan.prefill_s > long_s for plan in asked.plans) and not self._occupancy.spares_one(
            self._fleet.views.values()
        ):
            return replace(self._rules, longest_s=long_s)
        return self._rules

    def _grant(
        self, request: PlaceRequest, asked: Asked, choice: Choice, since: float, now: float
    ) -> Granted:
        assert choice.group is not None
        placement = self._fleet.grant(request, asked, choice.verdicts, choice.group, now)
        promised_at = self._promised.first_at(request.request_id)
        self._grants += 1
        self._remember_size(placement.lease.sealed_pages)
        return Granted(replace(placement, queue_s=now - since, promised_at=promised_at))

    def _admit(self, now: float) -> tuple[Outcome, ...]:
        """Grant whatever may go now, in the queue's order.

        The first that lacks pages is promised the group that has them soonest, and
        keeps the promise until it starts. Those behind it may overtake where they do
        not delay it (EASY backfilling: Lifka 1995).
        """
        if not len(self._queue) or not self.ready(now):
            return ()
        views = self._open_views(now)
        if not views:
            return ()
        outcomes: list[Outcome] = []
        deferred_s: dict[str, float] = {}
        in_front = True  # nobody before lacks pages
        # One pass is enough: a grant only takes room from those that were tried before.
        for waiting in list(islice(self._candidates(now), self.config.backfill_depth)):
            asked = self._ask_again(waiting.request, now)
            if not self._in_quota(waiting.request, asked):
                continue
            above = self._promised.outranked_by(waiting)
            late = now > waiting.due
            choice = self._choose_open(asked, views, now, above, None if late else deferred_s)
            if choice.group is not None:
                outcomes.append(self._grant(waiting.request, asked, choice, waiting.since, now))
                self._dequeue(waiting.request.request_id)
                if not (views := self._open_views(now)):
                    break
            elif choice.better_later is not None:
                view = self._fleet.views[choice.better_later]
                so_far_s = deferred_s.get(choice.better_later, 0.0)
                deferred_s[choice.better_later] = so_far_s + prefill_s(view, asked)
            elif in_front and math.isinf(self._rules_for(asked).longest_s):
                in_front = False
                self._consider_promise(asked, above, now)
        return tuple(outcomes)

    def _choose_open(
        self,
        asked: Asked,
        views: Sequence[GroupView],
        now: float,
        above: bool,
        deferred_s: Mapping[str, float] | None,
    ) -> Choice:
        """Choose among open groups and, to wait for, those that hold the prefix."""
        rules = self._rules_for(asked)
        if deferred_s is not None and asked.cached_blocks:
            known = self._fleet.views
            holders = [known[x] for x in asked.cached_blocks if x in known]
            views = [*views, *(view for view in holders if view.reported and view not in views)]
            scarcity = 1.0 + min(len(self._queue) / len(known), SCARCITY_MOST)
            rules = replace(rules, scarcity=scarcity)
        promise = None if above else self._promised.current
        return choose(views, asked, now, rules, promise, deferred_s)

    def _ask_again(self, request: PlaceRequest, now: float) -> Asked:
        """What was found out about a waiting request a moment ago is good enough to try it."""
        known = self._known.get(request.request_id)
        if known is None or now - known[0] > FRESH_S:
            known = self._known[request.request_id] = (now, self._fleet.ask(request))
        return known[1]

    def _open_views(self, now: float) -> list[GroupView]:
        return [view for view in self._fleet.in_use() if self._open(view, now)]

    def _open(self, view: GroupView, now: float) -> bool:
        """Whether the group could take any request at all; spares asking one by one."""
        account = view.account
        assert account is not None
        return (
            account.free_hot > 0
            and account.sequences < view.spec.max_sequences
            and view.backlog.seconds(now) <= self.config.ahead_s
        )

    def _candidates(self, now: float) -> Iterator[Waiting]:
        turn = self._grants % self.config.aged_every == 0
        order = self._queue.in_order(self._fleet.tenants.counter, now, aged_first=turn)
        return self._promised.in_order(order)

    def _consider_promise(self, asked: Asked, above: bool, now: float) -> None:
        views = self._fleet.views
        self._promised.consider(
            asked,
            views,
            self.ledger.leases,
            now,
            above=above,
            verdicts=lambda: self._choose(asked, views.values(), now, above=above).verdicts,
        )

    # The queue

    def _enqueue(self, request: PlaceRequest, now: float) -> None:
        config = self.config
        patience_s = config.stretch * self._fleet.least_prefill_s(request)
        patience_s = max(patience_s, config.patience_s)
        self._queue.put(request, now, now + patience_s)
        self._fleet.tenants.enter(request.tenant)

    def _dequeue(self, request_id: str) -> None:
        waiting = self._queue.cancel(request_id)
        if waiting is not None:
            self._fleet.tenants.leave(waiting.request.tenant)
            self._promised.forget(request_id)
            self._known.pop(request_id, None)

    def _wait_for(
        self,
        request: PlaceRequest,
        asked: Asked,
        choice: Choice,
        outcomes: tuple[Outcome, ...],
        now: float,
    ) -> tuple[Decision, Changes]:
        """The decision about a request that was queued a moment ago, and the others' outcomes."""
        own = [x for x in outcomes if x.request_id == request.request_id]
        others = Changes(tuple(x for x in outcomes if x.request_id != request.request_id))
        if own:
            return own[0], others
        position = self._position(request.request_id, now)
        start_s = self._refusals.projected_start_s(asked, choice, position, now)
        return Queued(request.request_id, position, start_s, choice.verdicts), others

    def _position(self, request_id: str, now: float) -> int:
        order = self._queue.in_order(self._fleet.tenants.counter, now)
        return next(
            i for i, waiting in enumerate(order) if waiting.request.request_id == request_id
        )

    def _expire(self, request: PlaceRequest) -> Refused:
        self._dequeue(request.request_id)
        assert request.timeout_s is not None
        return Refused(request.request_id, DeadlineUnreachableError(request.timeout_s, None))

    def _refuse_hopeless(self, now: float) -> Iterable[Outcome]:
        for waiting in list(self._queue.in_order(self._fleet.tenants.counter, now)):
            asked = self._fleet.ask(waiting.request)
            choice = self._choose(asked, self._fleet.views.values(), now)
            error = self._refusals.hopeless(waiting.request, asked, choice, len(self._queue), now)
            if error is not None:
                self._dequeue(waiting.request.request_id)
                yield Refused(waiting.request.request_id, error, choice.verdicts)

    def _in_quota(self, request: PlaceRequest, asked: Asked) -> bool:
        tenants = self._fleet.tenants
        if tenants.policy(request.tenant).quota_bytes is None:
            return True
        return tenants.within_quota(request.tenant, self._refusals.least_bytes(asked))

    def _remember_size(self, sealed_pages: int) -> None:
        """The hole to keep is as large as the greatest demand of late."""
        self._hole_pages = max(self._hole_pages * HOLE_MEMORY, float(sealed_pages))
        hole = int(self._hole_pages)
        if hole != self._rules.hole_pages:
            self._rules = replace(self._rules, hole_pages=hole)
