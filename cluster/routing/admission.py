"""Which requests start, which wait, and in which order they are admitted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from kvmesh.cluster.routing.backfill import Backfill
from kvmesh.cluster.routing.chooser import Chooser
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.demand import RequestDemand
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.forecast import promise
from kvmesh.cluster.routing.group import Group
from kvmesh.cluster.routing.leases import Leases
from kvmesh.cluster.routing.live import LiveRequest
from kvmesh.cluster.routing.outcome import BudgetEstimate, Decision, Enqueued, Granted, Refused
from kvmesh.cluster.routing.placement import GroupChoice, Promise, prefill_s
from kvmesh.cluster.routing.queue import WaitingQueue
from kvmesh.cluster.routing.refusals import Refusals
from kvmesh.cluster.routing.request import Past, PlaceRequest
from kvmesh.cluster.routing.verdict import NO_VERDICTS, Verdicts

FRESH_S = 0.5  # what was found out about a waiting request is good for this long
# An engine that a request has lost, but not the router within this time, is up after all.
LOST_ENGINE_S = 15.0
MAX_PROMISES = 4  # at a time
DRAINS = 2.0  # times that a full group takes to free the pages of a request
NEAR = 8  # so many at the front get a new forecast whenever the queue is read


class Admission:
    """The queue, and the way out of it.

    Until the fleet misses no group, or `rebuild_timeout_s` has passed, every request waits:
    missing ones may hold leases of a former router.
    """

    def __init__(self, config: RouterConfig, fleet: Fleet, leases: Leases, now: float) -> None:
        tuning = config.tuning
        self.queue = WaitingQueue(config.queue_limit)
        self._tuning = tuning
        self._fleet = fleet
        self._leases = leases
        self._chooser = Chooser(tuning, fleet)
        self._refusals = Refusals(config, fleet, leases)
        self._rebuild_until = now + config.rebuild_timeout_s
        self._arrivals = 0

    def ready(self, now: float) -> bool:
        """Whether requests are admitted, and not held until the expected groups are up."""
        return not self._fleet.missing or now >= self._rebuild_until

    def arrive(self, request: PlaceRequest, now: float) -> LiveRequest:
        """The record of a request that has just come; nothing is decided yet."""
        self._arrivals += 1
        self._chooser.note_arrival(now)
        demand = self._fleet.demand(request)
        due = now + max(self._tuning.stretch * demand.prefill_s, self._tuning.patience_s)
        return LiveRequest(
            request=request,
            demand=demand,
            demand_at=now,
            since=now,
            rank=(-request.priority, -max(request.past, Past.AGAIN), due, self._arrivals),
            due=due,
            drain_s=DRAINS * demand.page_share * self._leases.mean_s,
            deadline=None if request.timeout_s is None else now + request.timeout_s,
        )

    def place(self, live: LiveRequest, now: float) -> list[Decision]:
        """The request's own decision first, then those on others that waited."""
        name, demand, ahead = live.request_id, live.demand, len(self.queue)
        choice = self._chooser.choose(demand, now)
        if self.ready(now):
            error = self._refusals.hopeless(demand, choice, ahead, now)
            if error is not None:
                return [Refused(name, error, choice.verdicts)]
            if not ahead and choice.group is not None:
                self._enter(live)
                self.queue.note_passed()
                return [Granted(self._leases.grant(live, choice, now))]
        # One that was accepted before may wait all the same: they are no more than before.
        full = self.queue.full and live.request.past < Past.ACCEPTED
        tenant = live.request.tenant
        no_place = full and not self._displaced(tenant, self.queue.count_of(tenant) + 1)
        if no_place and choice.group is None:
            return [self._full(live, choice, ahead, now)]
        self._enter(live)
        self.queue.put(live)
        decisions = self.admit(now)
        others = [x for x in decisions if x.request_id != name]
        if len(others) < len(decisions):
            return [*(x for x in decisions if x.request_id == name), *others]
        if full and len(self.queue) > self.queue.limit:
            displaced = self._displaced(tenant, self.queue.count_of(tenant))
            if displaced is None:
                self.queue.retract(live)
                self._fleet.tenants.leave(tenant)
                return [self._full(live, choice, len(self.queue), now), *others]
            self.give_up(displaced, now)
            its_choice = self._chooser.choose(self._refresh(displaced, now), now)
            others.append(self._full(displaced, its_choice, len(self.queue), now))
        return [self._queued(live, choice, now), *others]

    def give_up(self, live: LiveRequest, now: float) -> None:
        """Take a waiting request out of the queue; it will not be granted."""
        self.queue.remove(live, now)
        self._fleet.tenants.leave(live.request.tenant)

    def expire(self, now: float) -> list[Refused]:
        """Refuse those whose deadline has passed."""
        refused: list[Refused] = []
        for live in self.queue.overdue(now):
            self.give_up(live, now)
            demand = self._refresh(live, now)
            choice = self._chooser.choose(demand, now)
            error = self._refusals.late(demand, choice, len(self.queue), now)
            refused.append(Refused(live.request_id, error, choice.verdicts))
        return refused

    def admit(self, now: float) -> list[Decision]:
        """Grant whatever may go now, in the queue's order; refuse what never may.

        The first that lacks pages is promised the group that has them soonest, and so are
        late ones after it, another group each. Requests may overtake where they do not
        delay those that were promised a group, from at most `backfill_depth` places behind
        the first that waits for the same group.
        """
        if not len(self.queue) or not self.ready(now):
            return []
        decisions: list[Decision] = []
        left: list[LiveRequest] = []
        deferred_s: dict[str, float] = {}
        promises: dict[str, Promise] = {}
        backfill = Backfill(self._fleet, self._tuning.backfill_depth)
        open_groups = backfill.among(self._chooser.open_groups(now))
        # One pass is enough: a grant only takes room from those that were tried before.
        for live in self.queue.in_order(self._fleet.tenants.counter, now, backfill.wants):
            if not open_groups:
                break
            demand = self._refresh(live, now)
            if self._refusals.never(demand):
                left.append(live)
                decisions.append(self._refuse(live, now))
                continue
            if self._chooser.holds_back(demand) or not (groups := backfill.groups(demand)):
                continue
            allowed = self._refusals.within_quota(demand, groups)
            if not allowed:
                backfill.lacks_quota(live.request)
                continue
            choice = self._chooser.choose_waiting(
                demand, open_groups, groups, now, promises, deferred_s
            )
            if choice.group is not None:
                left.append(live)
                placement = self._leases.grant(live, choice, now)
                decisions.append(Granted(placement))
                if (kept := promises.get(choice.group.name)) is not None:
                    lease = self._leases[placement.lease.lease_id]
                    promises[kept.group] = kept.after_grant(lease)
                open_groups = backfill.among(self._chooser.open_groups(now))
                continue
            if (later := choice.better_later) is not None:
                so_far_s = deferred_s.get(later.name, 0.0)
                deferred_s[later.name] = so_far_s + prefill_s(later, demand)
            elif not promises or (now > live.due and len(promises) < MAX_PROMISES):
                _promise(demand, allowed, promises, now)
            backfill.in_vain(allowed)
            open_groups = backfill.among(open_groups)
        for live in left:
            self.queue.remove(live, now)
        return decisions

    def estimate(self, request: PlaceRequest, now: float) -> BudgetEstimate:
        """What would happen to the request, without placing it."""
        demand, ahead = self._fleet.demand(request), len(self.queue)
        choice = self._chooser.choose(demand, now)
        never = self._refusals.never(demand)
        group = choice.group if not ahead and self.ready(now) else None
        start_s: float | None = 0.0
        if group is None:
            start_s = self._refusals.projected_start_s(demand, ahead, now)
        return BudgetEstimate(
            fits_ever=not never,
            fits_now=group is not None,
            group=None if group is None else group.name,
            projected_start_s=None if never else start_s,
            verdicts=tuple(choice.verdicts),
        )

    def standings(self, now: float) -> Iterator[Enqueued]:
        """Where each waiting request stands, first to last; nothing may change meanwhile."""
        for position, live in enumerate(self._in_line(now)):
            if position < NEAR:
                self._refresh(live, now)
                self._forecast(live, now)
            yield self._standing(live, position, now)

    def waiting_for_room(self, now: float) -> list[LiveRequest]:
        """Those that wait, earliest first, without those that wait for their tenant's quota.

        Of each tenant's only as many as its quota would let start by now.
        """
        left: dict[str, float] = {}
        found: list[LiveRequest] = []
        for live in sorted(self.queue, key=lambda live: live.since):
            request = live.request
            if self._fleet.quota_left(request) < math.inf:
                tenant = request.tenant
                least = self._refusals.min_bytes(self._refresh(live, now))
                rest = left.setdefault(tenant, self._fleet.quota_left(request)) - least
                if rest < 0:
                    continue
                left[tenant] = rest
            found.append(live)
        return found

    # Within

    def _enter(self, live: LiveRequest) -> None:
        """The request will wait, or run."""
        tenant, tenants = live.request.tenant, self._fleet.tenants
        if tenant not in self.queue.tenants:
            tenants.lift(tenant, self.queue.tenants)
        tenants.enter(tenant)

    def _displaced(self, tenant: str, count: int) -> LiveRequest | None:
        """Who leaves a full queue so that a request of the tenant may wait; None: that one has to.

        It is of the tenant with the largest share of the queue, by weight, if that is no smaller
        without it than the newcomer's; the youngest of those of its lowest priority.
        count: of the newcomer's requests, with this one
        """
        policy, queue = self._fleet.tenants.policy, self.queue
        left = {name: (queue.count_of(name) - 1) / policy(name).weight for name in queue.tenants}
        largest = max(left, key=lambda name: left[name], default=tenant)
        if largest == tenant or left[largest] < count / policy(tenant).weight:
            return None
        of_it = (x for x in queue if x.request.tenant == largest and x.request.past is Past.NEW)
        return min(of_it, key=lambda x: (x.request.priority, -x.rank[-1]), default=None)

    def _full(self, live: LiveRequest, choice: GroupChoice, ahead: int, now: float) -> Refused:
        error = self._refusals.queue_full(live.demand, choice, ahead, now)
        return Refused(live.request_id, error, choice.verdicts)

    def _refuse(self, live: LiveRequest, now: float) -> Refused:
        """Refuse a waiting request that came before its groups were known, or they changed."""
        self._fleet.tenants.leave(live.request.tenant)
        choice = self._chooser.choose(live.demand, now)
        error = self._refusals.hopeless(live.demand, choice, len(self.queue), now)
        assert error is not None
        return Refused(live.request_id, error, choice.verdicts)

    def _queued(self, live: LiveRequest, choice: GroupChoice, now: float) -> Enqueued:
        position = next(i for i, waiting in enumerate(self._in_line(now)) if waiting is live)
        self._forecast(live, now)
        return self._standing(live, position, now, choice.verdicts)

    def _forecast(self, live: LiveRequest, now: float) -> None:
        live.start_at = self._refusals.earliest_start(live.demand, now)

    def _standing(
        self, live: LiveRequest, position: int, now: float, verdicts: Verdicts = NO_VERDICTS
    ) -> Enqueued:
        start_s = None
        if live.start_at is not None:
            start_s = max(live.start_at - now, 0.0) + self._refusals.queue_s(position)
        return Enqueued(live.request_id, position, start_s, verdicts)

    def _in_line(self, now: float) -> Iterator[LiveRequest]:
        """All that wait, first to last."""
        return self.queue.in_order(self._fleet.tenants.counter, now)

    def _refresh(self, live: LiveRequest, now: float) -> RequestDemand:
        """What was found out about a waiting request a moment ago is good enough to try it."""
        if now - live.demand_at > FRESH_S or live.demand.kinds is not self._fleet.kinds:
            if live.request.lost_engines and now - live.since > LOST_ENGINE_S:
                live.request = replace(live.request, lost_engines=frozenset())
            live.demand, live.demand_at = self._fleet.demand(live.request), now
        return live.demand


def _promise(
    demand: RequestDemand, allowed: Iterable[Group], promises: dict[str, Promise], now: float
) -> None:
    """Promise a group to a request that lacks pages, one that is not promised yet."""
    others = [x for x in allowed if x.name not in promises]
    if (found := promise(others, demand, now)) is not None:
        promises[found.group] = found
