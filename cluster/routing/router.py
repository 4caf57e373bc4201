"""The router's core: synchronous, deterministic, given the time.

    place ──► Granted | Enqueued | Refused
    an engine's account (arrived, first tokens, wants, ends) ──► Grown, Granted, Withdrawn

Whatever frees pages first extends leases that want more, and then admits waiting
requests. Every call returns what it set in motion; the caller carries it out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvmesh.cluster.routing.admission import Admission
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    RequestAbortedError,
    RequestIdInUseError,
)
from kvmesh.cluster.routing.fleet import Fleet
from kvmesh.cluster.routing.live import LiveRequest
from kvmesh.cluster.routing.outcome import (
    Explained,
    Outcome,
    Refused,
    RouterStatus,
    TenantStatus,
    Withdrawn,
)
from kvmesh.cluster.routing.records import Records
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.workers.lease import AccountUpdate, LeaseTerms
from kvmesh.workers.loads import EngineInfo, EngineLoads


class Router:
    """Admits requests to groups so that leases never exceed what a group holds.

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
        self.fleet = Fleet(config, epoch)
        self.admission = Admission(config, self.fleet, now, expected_groups)
        self._records = Records()

    # Requests

    def place(self, request: PlaceRequest, now: float) -> list[Outcome]:
        """Place the request, queue it, or refuse it with the reason.

        Returns the request's own outcome first, then what it set in motion for others. If
        it supersedes an incarnation that waited, a refusal of that one is among the others:
        it has the same id, so settle the others before the request's own outcome.
        """
        others: list[Outcome] = []
        if (older := self._records.live.get(request.request_id)) is not None:
            if not (request.supersedes or request.resumed):
                # Counted alone: it says nothing about the live request.
                self._records.refused[RequestIdInUseError.__name__] += 1
                return [Refused(request.request_id, RequestIdInUseError(request.request_id))]
            others = [*self._abort(older, now), *self._continue(now)]
        live = self.admission.arrive(request, now)
        own, *more = self.admission.place(live, now)
        if not isinstance(own, Refused):
            self._records.live[request.request_id] = live
        for decision in (own, *more):
            self._records.note(decision, now)
        return [own, *others, *more]

    def cancel(self, request_id: str, now: float) -> list[Outcome]:
        """The caller of a waiting request is gone. There is no outcome for itself."""
        live = self._records.live.get(request_id)
        if live is None or live.lease is not None:
            return []
        self.admission.give_up(live, now)
        del self._records.live[request_id]
        return self._continue(now)

    def abort(self, request_id: str, now: float) -> list[Outcome]:
        """End the newest incarnation of a request, if it is live.

        A waiting one is refused. A lease is withdrawn, and stays until the engine says
        that it has ended.
        """
        live = self._records.live.get(request_id)
        if live is None:
            return []
        return [*self._abort(live, now), *self._continue(now)]

    def release(self, lease_id: str, now: float) -> list[Outcome]:
        """Give back a lease whose request will never be submitted; again is harmless.

        If its sequences have arrived all the same, the engine has to end them first.
        """
        lease = self.fleet.leases.get(lease_id)
        if lease is None:
            return []
        if lease.arrived:
            return [Withdrawn(lease.group, lease_id)]
        self.fleet.release(lease, now)
        self._records.lease_over(lease)
        return self._continue(now)

    def finished(self, lease_id: str) -> None:
        """The ingress has seen the request end, so its id is free for another.

        The lease stays until the engine's account says that its pages are free.
        """
        lease = self.fleet.leases.get(lease_id)
        if lease is not None:
            self._records.request_over(lease)

    # Engines

    def group_up(
        self, group: str, info: EngineInfo, leases: Iterable[LeaseTerms], now: float
    ) -> list[Outcome]:
        """A group's engine is connected, and runs under these leases. It takes requests at once.

        Leases from before it connected are void unless it lists them.
        """
        self._void(group, now)
        self.fleet.group_up(group, info, leases, now)
        self.admission.missing.discard(group)
        return self._continue(now)

    def group_down(self, group: str, now: float) -> list[Outcome]:
        """A group's engine, or the connection to it, is lost. Its leases are void.

        Requests that only this group can hold wait for its return.
        """
        self._void(group, now)
        return self._continue(now)

    def group_drains(self, group: str) -> None:
        """A group's engine finishes what it has and takes nothing new; its leases stay."""
        self.fleet.groups[group].draining = True

    def account(self, group: str, update: AccountUpdate, now: float) -> list[Outcome]:
        """What changed in the account of a group's engine; ignored if the group is down."""
        known = self.fleet.groups.get(group)
        if known is None or known.account is None:
            return []
        leases = self.fleet.leases
        for terms in update.arrived:
            if (lease := leases.get(terms.lease_id)) is None:
                # Granted by a former router, or before the group's connection broke.
                self.fleet.adopt(group, terms, now)
            else:
                lease.arrived = True
        for lease_id in update.first_tokens:
            if (lease := leases.get(lease_id)) is not None:
                self.fleet.first_token(lease, now)
        for want in update.wants:
            if (lease := leases.get(want.lease_id)) is not None:
                self.fleet.want(lease, want)
        for end in update.ended:
            if (lease := leases.get(end.lease_id)) is not None:
                self.fleet.end(lease, now, end.output_tokens)
                self._records.lease_over(lease)
        # An arrival alone makes no room.
        news = update.first_tokens or update.wants or update.ended
        return self._continue(now) if news else []

    def audit(self, group: str, loads: EngineLoads) -> tuple[str, ...]:
        """Where an engine's report and the ledger disagree, in words; nothing if they agree."""
        known = self.fleet.groups.get(group)
        return known.account.audit(loads) if known and known.account else ()

    # Time

    def tick(self, now: float) -> list[Outcome]:
        """What time alone brings: deadlines, leases that never arrived, the end of a rebuild."""
        outcomes: list[Outcome] = []
        for live in self.admission.queue.overdue(now):
            self.admission.give_up(live, now)
            assert live.request.timeout_s is not None
            error = DeadlineUnreachableError(live.request.timeout_s, None)
            refused = Refused(live.request_id, error)
            self._records.note(refused, now)
            outcomes.append(refused)
        for lease in self.fleet.never_arrived(now - self.config.lease_ttl_s):
            self.fleet.release(lease, now)
            self._records.lease_over(lease, expired=True)
            outcomes.append(Withdrawn(lease.group, lease.lease_id))
        return [*outcomes, *self._continue(now)]

    # Reading

    def explain(self, request_id: str, now: float) -> tuple[Explained, ...]:
        """What was decided of a request, oldest first; nothing if it is not known, or no longer."""
        return self._records.explain(request_id, now)

    def tenant_status(self, tenant: str) -> TenantStatus:
        tenants, queued = self.fleet.tenants, self.admission.queue.count_of(tenant)
        return TenantStatus(
            queued=queued,
            running=tenants.live(tenant) - queued,
            leased_bytes=tenants.leased_bytes(tenant),
            quota_bytes=tenants.policy(tenant).quota_bytes,
        )

    def status(self, now: float) -> RouterStatus:
        """The budget as it stands."""
        records, queue = self._records, self.admission.queue
        return RouterStatus(
            epoch=self.fleet.epoch,
            ready=self.admission.ready(now),
            queue_depth=len(queue),
            queue_limit=queue.limit,
            live_requests=len(records.live),
            leases=len(self.fleet.leases),
            groups=tuple(group.status() for group in self.fleet.groups.values()),
            granted_total=records.granted,
            released_total=records.released,
            expired_total=records.expired,
            refused_total=dict(records.refused),
        )

    # Within

    def _continue(self, now: float) -> list[Outcome]:
        """Use what has become free: leases that want more come before new ones."""
        grown = self.fleet.grow_wanting(now)
        decisions = self.admission.admit(now)
        for decision in decisions:
            self._records.note(decision, now)
        return [*grown, *decisions]

    def _abort(self, live: LiveRequest, now: float) -> list[Outcome]:
        if live.lease is not None:
            return [Withdrawn(live.lease.group, live.lease.lease_id)]
        self.admission.give_up(live, now)
        refused = Refused(live.request_id, RequestAbortedError())
        self._records.note(refused, now)
        return [refused]

    def _void(self, group: str, now: float) -> None:
        for lease in self.fleet.group_down(group, now):
            self._records.lease_over(lease)
