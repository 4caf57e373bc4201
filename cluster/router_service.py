"""The router as a process of a cluster: messages in, the pure router, messages out.

No call blocks. A request that waits for pages is an entry of `_callers`, and the outcome that
ends its wait is sent to its caller.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace

from kvmesh.cluster.errors import DrainingError, Failure
from kvmesh.cluster.ingress.error_table import reason_label, to_wire
from kvmesh.cluster.link import Link
from kvmesh.cluster.membership import Member, Membership
from kvmesh.cluster.messages import (
    Abort,
    Aborted,
    AccountNews,
    AskEstimate,
    AskExplanation,
    AskReport,
    AskStatus,
    AskTenant,
    CallFailed,
    Cancel,
    Decisions,
    Drain,
    Estimated,
    Extend,
    Finished,
    Hello,
    Place,
    Placed,
    Release,
    Replaced,
    Report,
    Status,
    TenantUse,
    Waiting,
    Withdraw,
)
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import RequestIdInUseError, RoutingError
from kvmesh.cluster.routing.outcome import Enqueued, Granted, Grown, Outcome, Refused, Withdrawn
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.telemetry.logs import about
from kvmesh.cluster.telemetry.meters import RouterMeters
from kvmesh.workers.loads import EngineLoads

logger = logging.getLogger(__name__)

TICK_S = 0.25
FRESH_TIMEOUT_S = 2.0  # how long a status waits for the engines' reports
INFORM_PERIOD_S = 1.0  # how often waiting callers learn what has changed
MEASURE_PERIOD_S = 1.0
# Changes that a caller is informed of: by this share, and of a start also by this time.
NOTICED_SHARE, NOTICED_S = 0.05, 1.0


@dataclass(slots=True, eq=False)
class _Caller:
    """Of a waiting request. since: when it came

    position, start_at: as it was informed last; all on the service's clock
    """

    peer: _RouterPeer
    call: int
    since: float
    position: int = -1
    start_at: float = -math.inf  # also if unknown

    def inform(self, standing: Enqueued, now: float) -> None:
        """Send where its request stands, unless it nearly knows that."""
        position, start_s = standing.position, standing.projected_start_s
        start_at = -math.inf if start_s is None else now + start_s
        moved = abs(position - self.position) > NOTICED_SHARE * self.position
        shift_s = abs(start_at - self.start_at)  # NaN if both are unknown
        if moved or shift_s > max(NOTICED_S, NOTICED_SHARE * (self.start_at - now)):
            self.position, self.start_at = position, start_at
            self.peer.send(Waiting(self.call, position, start_s))


@dataclass(slots=True, eq=False)
class _FreshStatus:
    """A status call that waits for reports of these groups until a deadline."""

    peer: _RouterPeer
    call: int
    awaited: set[str]
    until: float


@dataclass(slots=True)
class _Known:
    """What outlives a group's connection."""

    reports: dict[str, EngineReport] = field(default_factory=dict)
    audits: int = 0
    audit_faults: int = 0


class RouterService:
    """The one router of a cluster.

    groups: names of the groups that are expected to be up
    configured: of all groups, those that may be added later included; `groups` if None
    clock: seconds, monotonic
    on_refused: called with the error whenever a request is refused
    """

    def __init__(
        self,
        config: RouterConfig,
        meters: RouterMeters,
        *,
        groups: Collection[str] = (),
        configured: Collection[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Greater than any former router's; every lease carries the epoch of its router.
        epoch = time.time_ns() // 1_000_000
        self.router = Router(config, epoch, clock(), expected_groups=groups)
        self._clock = clock
        self._meters = meters
        self.membership = Membership(
            groups if configured is None else configured, groups, self.router.group_drains
        )
        self._groups = self.membership.members
        self._callers: dict[str, _Caller] = {}  # of waiting requests, by when they came
        self._informed_s = self._measured_s = clock()
        self._fresh: list[_FreshStatus] = []
        self._known = _Known()
        self._draining = False
        self.on_refused: Callable[[RoutingError], None] = lambda _: None

    def accept(self, connection: Link) -> _RouterPeer:
        """The handler of a new connection, an engine's or an ingress's."""
        return _RouterPeer(self, connection)

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        now = self._clock()
        self.settle(self.router.tick(now))
        self._answer_fresh(now)
        if self._callers and now - self._informed_s >= INFORM_PERIOD_S:
            self._informed_s = now
            for standing in self.router.standings(now):
                self._callers[standing.request_id].inform(standing, now)
        if now - self._measured_s >= MEASURE_PERIOD_S:
            self._measured_s = now
            self._measure()

    def _measure(self) -> None:
        tenants = {name: self.router.tenant_status(name) for name in self._meters.tenants}
        membership = self.membership
        self._meters.status(self.status(), membership.configured, membership.expected, tenants)

    @property
    def now(self) -> float:
        return self._clock()

    def drain(self) -> None:
        """Accept nothing new; ingresses see it in the status."""
        self._draining = True

    def status(self) -> ClusterStatus:
        return ClusterStatus(
            router=self.router.status(self._clock()),
            reports=dict(self._known.reports),
            healthy=frozenset(self._groups),
            draining=self._draining,
            audits_total=self._known.audits,
            audit_faults_total=self._known.audit_faults,
            requests=self._requests_of_reports(),
            oldest_wait_s=self._oldest_wait_s(),
        )

    def _requests_of_reports(self) -> dict[str, str]:
        """tenant/id by lease, of the sequences that reports name."""
        leases = self.router.fleet.leases
        found = {}
        for report in self._known.reports.values():
            for sequence in report.loads.oldest:
                lease = leases.get(sequence.lease_id)
                if lease is not None and lease.request is not None:
                    found[sequence.lease_id] = lease.request.request_id
        return found

    def _oldest_wait_s(self) -> float:
        oldest = next(iter(self._callers.values()), None)
        return 0.0 if oldest is None else self._clock() - oldest.since

    # Ingresses

    def place(self, message: Place, peer: _RouterPeer) -> None:
        request = message.request
        name = request.request_id
        if self._draining and not request.resumed:
            peer.fail(message.call, Failure.of(DrainingError()))
            return
        if name in self._callers:
            if not (request.supersedes or request.resumed):
                peer.fail(message.call, Failure.of(RequestIdInUseError(name)))
                return
            self.settle(self.router.abort(name, self._clock()))
        now = self._clock()
        self._callers[name] = _Caller(peer, message.call, now)
        peer.waiting[message.call] = name
        started_s = time.perf_counter()
        outcomes = self.router.place(request, now)
        self._meters.decided(time.perf_counter() - started_s)
        self.settle(outcomes)

    def cancel(self, call: int, peer: _RouterPeer) -> None:
        """The caller no longer waits. A placement already on its way comes back as a Release."""
        name = peer.waiting.pop(call, None)
        if name is not None:
            del self._callers[name]
            self.settle(self.router.cancel(name, self._clock()))

    def release(self, lease_id: str) -> None:
        self.settle(self.router.release(lease_id, self._clock()))

    def abort(self, request_id: str) -> bool:
        """End a request. Returns False if there is none."""
        outcomes = self.router.abort(request_id, self._clock())
        self.settle(outcomes)
        return bool(outcomes)

    def ask_status(self, message: AskStatus, peer: _RouterPeer) -> None:
        if not message.fresh or not self._groups:
            peer.send(Status(message.call, self.status()))
            return
        until = self._clock() + FRESH_TIMEOUT_S
        self._fresh.append(_FreshStatus(peer, message.call, set(self._groups), until))
        for group in self._groups.values():
            group.connection.send(AskReport())

    # Engines

    def group_up(self, message: Hello, connection: Link) -> None:
        """The later engine of a group stays: one that hung may return after its replacement."""
        name, now = self.membership.name_for(message), self._clock()
        if not name:
            _replace(message.group, connection)
            return
        former = self._groups.get(name)
        if former is not None and self.membership.has_to_leave(former, message):
            self._retire(former)
        elif former is not None:
            self.group_down(name, former.connection)
            if former.started_ns < message.started_ns:
                _replace(name, former.connection)
            else:
                former.connection.close()
        logger.info(
            "group %s is up with %d leases", name, len(message.leases), extra=about(group=name)
        )
        self.membership.join(name, message, connection)
        self.settle(self.router.group_up(name, message.info, message.leases, now))
        self.membership.close_unwanted(name, message)
        self.account(name, AccountNews(message.update, message.pages))

    def group_down(self, name: str, connection: Link) -> None:
        if self.membership.name_of(connection) != name:
            return
        self.membership.leave(name)
        if name in self.membership.expected:
            logger.warning("group %s is down", name, extra=about(group=name))
            self.settle(self.router.group_down(name, self._clock()))
            if (report := self._known.reports.get(name)) is not None:
                # What it had is gone; what it is made of stays known.
                self._known.reports[name] = EngineReport(report.info, EngineLoads())
        else:
            logger.info("group %s has left", name, extra=about(group=name))
            self._forget(name)
        self._reported(name)

    def expect(self, groups: frozenset[str]) -> None:
        """These groups are to be up from now on; others close, and are forgotten once they left."""
        for name in self.membership.expect(groups) & self.router.fleet.groups.keys():
            self._forget(name)

    def account(self, name: str, message: AccountNews) -> None:
        now = self._clock()
        pages = message.pages
        if pages.held or pages.dropped:
            self.router.pages_changed(name, pages.held, pages.dropped)
        if message.update:
            self.settle(self.router.account(name, message.update, now))

    def report(self, name: str, message: Report) -> None:
        if message.report.draining:
            self.membership.close(name)
        closed = self._groups[name].closed
        self._known.reports[name] = replace(message.report, draining=closed)
        if message.audited:
            self._known.audits += 1
            if faults := self.router.audit(name, message.report.loads):
                self._known.audit_faults += 1
                words = "; ".join(faults)
                logger.error(
                    "group %s and the ledger disagree: %s", name, words, extra=about(group=name)
                )
        self._reported(name)

    # Within

    def _retire(self, member: Member) -> None:
        """An engine that leaves ends what it has under another name."""
        former, name = member.name, self.membership.rename(member)
        self.router.group_retires(former, name)
        if (report := self._known.reports.pop(former, None)) is not None:
            self._known.reports[name] = replace(report, draining=True)

    def _forget(self, name: str) -> None:
        """The group will not return."""
        self.settle(self.router.group_leaves(name, self._clock()))
        self._known.reports.pop(name, None)

    def settle(self, outcomes: Iterable[Outcome]) -> None:
        """Send each outcome to the caller or the engine that it concerns."""
        for outcome in outcomes:
            match outcome:
                case Granted():
                    self._granted(outcome)
                case Refused(request_id=name, error=error):
                    self.on_refused(error)
                    wire = to_wire(error)
                    self._meters.refused(wire, reason_label(wire))
                    self._refused(name, Failure.of(error))
                case Grown(group=group, lease=lease):
                    self._groups[group].connection.send(Extend((lease,)))
                case Withdrawn(group=group, lease_id=lease_id):
                    self._groups[group].connection.send(Withdraw((lease_id,)))
                case Enqueued(request_id=name):
                    self._callers[name].inform(outcome, self._clock())

    def _granted(self, outcome: Granted) -> None:
        placement = outcome.placement
        caller = self._callers.pop(placement.request_id)
        del caller.peer.waiting[caller.call]
        group = self._groups[placement.group]
        caller.peer.send(
            Placed(
                caller.call,
                placement.group,
                group.info,
                group.address,
                placement.lease,
                placement.lease_bytes,
                placement.queue_s,
            )
        )

    def _refused(self, name: str, failure: Failure) -> None:
        caller = self._callers.pop(name)
        del caller.peer.waiting[caller.call]
        caller.peer.fail(caller.call, failure)
        for decided in self.router.explain(name, self._clock())[-1:]:
            logger.info("request %s: %s", name, "\n".join(decided.lines()), extra=about(name))

    def _reported(self, name: str) -> None:
        for waiting in self._fresh:
            waiting.awaited.discard(name)
        self._answer_fresh(self._clock())

    def _answer_fresh(self, now: float) -> None:
        done = [x for x in self._fresh if not x.awaited or now >= x.until]
        if done:
            self._fresh = [x for x in self._fresh if x not in done]
            for waiting in done:
                waiting.peer.send(Status(waiting.call, self.status()))


def _replace(name: str, connection: Link) -> None:
    logger.warning("an engine of group %s has been replaced", name, extra=about(group=name))
    connection.send(Replaced())
    connection.close()


class _RouterPeer:
    """One connection: an engine's once it has sent Hello, otherwise an ingress's.

    waiting: its waiting requests, by call
    """

    def __init__(self, service: RouterService, connection: Link) -> None:
        self._service = service
        self._connection = connection
        self.waiting: dict[int, str] = {}
        self.send = connection.send

    def received(self, message: object) -> None:
        service = self._service
        group = service.membership.name_of(self._connection)
        match message:
            case AccountNews() | Report() if not group:
                pass  # of an engine that was replaced, on its way before it heard of it
            case AccountNews():
                service.account(group, message)
            case Place():
                service.place(message, self)
            case Cancel(call=call):
                service.cancel(call, self)
            case Release(lease_id=lease_id):
                service.release(lease_id)
            case Finished(lease_id=lease_id):
                service.router.finished(lease_id)
            case Report():
                service.report(group, message)
            case Abort(call=call, request_id=request_id):
                self.send(Aborted(call, service.abort(request_id)))
            case Drain():
                service.drain()
            case AskStatus():
                service.ask_status(message, self)
            case AskEstimate(call=call, request=request):
                self.send(Estimated(call, service.router.estimate(request, service.now)))
            case AskTenant(call=call, tenant=tenant):
                self.send(TenantUse(call, service.router.tenant_status(tenant)))
            case AskExplanation(call=call, request_id=request_id):
                self.send(Decisions(call, service.router.explain(request_id, service.now)))
            case Hello():
                service.group_up(message, self._connection)

    def lost(self) -> None:
        if group := self._service.membership.name_of(self._connection):
            self._service.group_down(group, self._connection)
        for call in list(self.waiting):
            self._service.cancel(call, self)

    def fail(self, call: int, failure: Failure) -> None:
        self.send(CallFailed(call, failure))
