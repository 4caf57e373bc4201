"""The router's core: synchronous, deterministic, given the time.

    place ──► Granted | Enqueued | Refused
    an engine's account (arrived, first tokens, wants, ends) ──► Grown, Granted, Withdrawn

Whatever frees pages first extends leases that want more, and then admits waiting
requests. Every call returns what it set in motion; the caller carries it out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from kvmesh.cluster.routing.admission import Admission
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import (
    RequestAbortedError,
    RequestIdInUseError,
    RoutingError,
)
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.leases import Leases
from kvmesh.cluster.routing.live import Lease, LiveRequest
from kvmesh.cluster.routing.outcome import Decision, Granted, Outcome, Refused, Withdrawn
from kvmesh.cluster.routing.records import Records
from kvmesh.cluster.routing.request import Past, PlaceRequest
from kvmesh.workers.lease import AccountUpdate, LeaseTerms
from kvmesh.workers.loads import EngineInfo

MAX_WITHDRAWN = 4096


class Router:
    """Admits requests to groups so that leases never exceed what a group holds.

    fleet, leases, admission, records: to be read; and what decides nothing is done there
    epoch: greater than any former router's, e.g. the time of its start
    now: seconds on a monotonic clock, in every call
    expected_groups: those that may hold leases of a former router; until they are up, or
        `rebuild_timeout_s` has passed, every request waits
    """

    def __init__(
        self,
        config: RouterConfig,
        epoch: int,
        now: float,
        *,
        expected_groups: Collection[str] = (),
    ) -> None:
        self.config = config
        self.fleet = Fleet(config, expected_groups)
        self.leases = Leases(self.fleet, epoch)
        self.admission = Admission(config, self.fleet, self.leases, now)
        self.records = Records()
        # Ids of withdrawn leases that have not ended, latest last. A connection may be lost with
        # the order on its way, so who lists one of these gets it again.
        self._withdrawn: OrderedDict[str, None] = OrderedDict()

    # Requests

    def place(self, request: PlaceRequest, now: float) -> list[Outcome]:
        """Place the request, queue it, or refuse it with the reason.

        Returns the request's own outcome first, then what it set in motion for others. If
        it supersedes an incarnation that waited, a refusal of that one is among the others:
        it has the same id, so settle the others before the request's own outcome.
        """
        others: list[Outcome] = []
        if (older := self.records.newest(request.request_id)) is not None:
            if (error := self.conflict(request)) is not None:
                # Counted alone: it says nothing about the live request.
                self.records.refused[type(error).__name__] += 1
                return [Refused(request.request_id, error)]
            others = [*self._abort(older, now), *self._continue(now)]
        live = self.admission.arrive(request, now)
        own, *more = self.admission.place(live, now)
        if not isinstance(own, Refused):
            self.records.waits(live)
        self._note((own, *more), now)
        return [own, *others, *more]

    def conflict(self, request: PlaceRequest) -> RoutingError | None:
        """Why the request may not take the place of the live one with its id, if there is one.

        An ingress that was cut off asks for its requests again before it hears that their
        clients have left; they may run elsewhere by now.
        """
        live = self.records.newest(request.request_id)
        if live is None or request.past is Past.AGAIN:
            return None
        if request.past < Past.AGAIN:
            return RequestIdInUseError(request.request_id)
        return None if request.incarnation == live.incarnation else RequestAbortedError()

    def cancel(self, request_ids: Collection[str], now: float) -> list[Outcome]:
        """The caller of these is gone: none that waits is granted, and none has an outcome."""
        newest = map(self.records.newest, request_ids)
        waiting = [live for live in newest if isinstance(live, LiveRequest)]
        for live in waiting:
            self.admission.give_up(live, now)
            self.records.gave_up(live)
        return self._continue(now) if waiting else []

    def abort(self, request_id: str, now: float) -> list[Outcome]:
        """End the newest incarnation of a request, if it is live.

        A waiting one is refused. A lease is withdrawn, and stays until the engine says
        that it has ended.
        """
        live = self.records.newest(request_id)
        if live is None:
            return []
        return [*self._abort(live, now), *self._continue(now)]

    def release(self, lease_id: str, now: float) -> list[Outcome]:
        """Give back a lease whose request will never be submitted; again is harmless.

        If its sequences have arrived all the same, the engine has to end them first.
        """
        lease = self.leases.get(lease_id)
        if lease is None:
            return []
        if lease.arrived:
            return [self._withdraw(lease)]
        self.leases.release(lease, now)
        self.records.lease_over(lease)
        return self._continue(now)

    def finished(self, lease_id: str) -> None:
        """The ingress has seen the request end, so its id is free for another.

        The lease stays until the engine's account says that its pages are free.
        """
        lease = self.leases.get(lease_id)
        if lease is not None:
            self.records.request_over(lease)

    # Engines

    def group_up(
        self,
        group: str,
        info: EngineInfo,
        leases: Iterable[LeaseTerms],
        now: float,
        *,
        draining: bool = False,
    ) -> list[Outcome]:
        """A group's engine is connected, and runs under these leases.

        It takes requests at once, unless it drains. Leases from before it connected are void
        unless it lists them.
        """
        self._void(group, now)
        self.fleet.up(group, info, draining=draining)
        again = [order for terms in leases for order in self._adopt(group, terms, now)]
        return [*again, *self._continue(now)]

    def group_down(self, group: str, now: float) -> list[Outcome]:
        """A group's engine, or the connection to it, is lost. Its leases are void.

        Requests that only this group can hold wait for its return.
        """
        self._void(group, now)
        return self._continue(now)

    def group_leaves(self, group: str, now: float) -> list[Outcome]:
        """Like `group_down`, of a group that will not return."""
        outcomes = self.group_down(group, now)
        self.fleet.forget(group)
        return outcomes

    def account(self, group: str, update: AccountUpdate, now: float) -> list[Outcome]:
        """What changed in the account of a group's engine; ignored if the group is down."""
        if self.fleet.account(group) is None:
            return []
        leases, again = self.leases, list[Outcome]()
        for terms in update.arrived:
            if (lease := leases.get(terms.lease_id)) is None:
                # Granted by a former router, or before the group's connection broke.
                again += self._adopt(group, terms, now)
            else:
                lease.arrived = True
        for lease_id in update.first_tokens:
            if (lease := leases.get(lease_id)) is not None:
                leases.first_token(lease, now)
        for want in update.wants:
            if (lease := leases.get(want.lease_id)) is not None:
                leases.want(lease, want)
        for end in update.ended:
            self._withdrawn.pop(end.lease_id, None)
            if (lease := leases.get(end.lease_id)) is not None:
                leases.end(lease, now, end.output_tokens)
                self.records.lease_over(lease)
        # An arrival alone makes no room.
        news = update.first_tokens or update.wants or update.ended
        return [*again, *self._continue(now)] if news else again

    # Time

    def tick(self, now: float) -> list[Outcome]:
        """What time alone brings: deadlines, leases that never arrived, the end of a rebuild."""
        expired = self.admission.expire(now)
        self._note(expired, now)
        outcomes: list[Outcome] = [*expired]
        for lease in self.leases.never_arrived(now - self.config.lease_ttl_s):
            self.leases.release(lease, now)
            self.records.lease_over(lease, expired=True)
            outcomes.append(self._withdraw(lease))
        return [*outcomes, *self._continue(now)]

    # Within

    def _continue(self, now: float) -> list[Outcome]:
        """Use what has become free: leases that want more come before new ones."""
        grown = self.leases.grow_wanting(now)
        decisions = self.admission.admit(now)
        self._note(decisions, now)
        return [*grown, *decisions]

    def _note(self, decisions: Iterable[Decision], now: float) -> None:
        for decision in decisions:
            self.records.note(decision, now)
            if isinstance(decision, Granted):
                self.records.leased(self.leases[decision.placement.lease.lease_id])

    def _adopt(self, group: str, terms: LeaseTerms, now: float) -> list[Withdrawn]:
        """Enter a lease that is not in the ledger, and whose sequences the engine has.

        If it was withdrawn before, it is again.
        """
        lease = self.leases.adopt(group, terms, now)
        newest = self.records.newest(lease.request_id)
        if newest is None or (isinstance(newest, Lease) and newest.age < lease.age):
            self.records.leased(lease)
        return [self._withdraw(lease)] if lease.lease_id in self._withdrawn else []

    def _withdraw(self, lease: Lease) -> Withdrawn:
        self._withdrawn[lease.lease_id] = None
        if len(self._withdrawn) > MAX_WITHDRAWN:
            self._withdrawn.popitem(last=False)
        return Withdrawn(lease.group, lease.lease_id)

    def _abort(self, live: LiveRequest | Lease, now: float) -> list[Outcome]:
        if isinstance(live, Lease):
            return [self._withdraw(live)]
        self.admission.give_up(live, now)
        refused = Refused(live.request_id, RequestAbortedError())
        self._note([refused], now)
        return [refused]

    def _void(self, group: str, now: float) -> None:
        for lease in self.leases.void(group, now):
            self.records.lease_over(lease)
        self.fleet.down(group)
