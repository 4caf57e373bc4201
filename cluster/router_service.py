"""The router as a process of a cluster: messages in, the pure router, messages out.

No call blocks. A request that waits for pages has an entry in `callers`, and the outcome that
ends its wait is sent there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kvmesh.cluster.errors import DrainingError, Failure
from kvmesh.cluster.ingress.error_table import reason_label, to_wire
from kvmesh.cluster.link import Address, Link
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
    Withdraw,
)
from kvmesh.cluster.report_book import ReportBook
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import RequestIdInUseError
from kvmesh.cluster.routing.outcome import (
    Enqueued,
    Granted,
    Grown,
    Outcome,
    Placement,
    Refused,
    Withdrawn,
)
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.telemetry.logs import about
from kvmesh.cluster.telemetry.meters import RouterMeters
from kvmesh.cluster.waiting_callers import WaitingCaller, WaitingCallers
from kvmesh.workers.loads import EngineInfo

logger = logging.getLogger(__name__)

TICK_S = 0.25
INFORM_PERIOD_S = 1.0  # how often waiting callers learn what has changed
MEASURE_PERIOD_S = 1.0


@dataclass(slots=True, eq=False)
class _Group:
    """A group whose engine is connected. started_ns: of the engine, see Hello"""

    name: str
    connection: Link
    info: EngineInfo
    address: Address
    started_ns: int


class RouterService:
    """The one router of a cluster.

    groups: names of the groups that are expected to come up
    clock: seconds, monotonic
    """

    def __init__(
        self,
        config: RouterConfig,
        meters: RouterMeters,
        *,
        groups: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Greater than any former router's; every lease carries the epoch of its router.
        epoch = time.time_ns() // 1_000_000
        self.router = Router(config, epoch, clock(), expected_groups=groups)
        self.clock = clock
        self._meters = meters
        self._names = tuple(groups)
        self._groups: dict[str, _Group] = {}
        self.callers = WaitingCallers()
        self._informed_s = self._measured_s = clock()
        self._reports = ReportBook()
        self._draining = False

    def accept(self, connection: Link) -> RouterPeer:
        """The handler of a new connection, an engine's or an ingress's."""
        return RouterPeer(self, connection)

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        now = self.clock()
        self.settle(self.router.tick(now))
        self._answer_reported(now)
        if self.callers and now - self._informed_s >= INFORM_PERIOD_S:
            self._informed_s = now
            self.callers.inform(self.router.admission.standings(now), now)
        if now - self._measured_s >= MEASURE_PERIOD_S:
            self._measured_s = now
            tenants = {name: self.router.tenant_status(name) for name in self._meters.tenants}
            self._meters.status(self.status(), self._names, tenants)

    def drain(self) -> None:
        """Accept nothing new; ingresses see it in the status."""
        self._draining = True

    def status(self) -> ClusterStatus:
        now = self.clock()
        return ClusterStatus(
            router=self.router.status(now),
            reports=dict(self._reports.latest),
            healthy=frozenset(self._groups),
            draining=self._draining,
            audits_total=self._reports.audits,
            audit_faults_total=self._reports.audit_faults,
            requests=self._reports.requests(self.router.fleet.leases),
            oldest_wait_s=self.callers.oldest_wait_s(now),
        )

    # Ingresses

    def place(self, message: Place, peer: RouterPeer) -> None:
        request = message.request
        name = request.request_id
        if self._draining and not request.resumed:
            peer.fail(message.call, Failure.of(DrainingError()))
            return
        if name in self.callers:
            if not (request.supersedes or request.resumed):
                peer.fail(message.call, Failure.of(RequestIdInUseError(name)))
                return
            self.settle(self.router.abort(name, self.clock()))
        now = self.clock()
        self.callers.add(name, WaitingCaller(peer, message.call, now))
        started_s = time.perf_counter()
        outcomes = self.router.place(request, now)
        self._meters.decided(time.perf_counter() - started_s)
        self.settle(outcomes)

    def release(self, lease_id: str) -> None:
        self.settle(self.router.release(lease_id, self.clock()))

    def ask_status(self, message: AskStatus, peer: RouterPeer) -> None:
        if not message.fresh or not self._groups:
            peer.send(Status(message.call, self.status()))
            return
        self._reports.wait(peer, message.call, self._groups, self.clock())
        for group in self._groups.values():
            group.connection.send(AskReport())

    # Engines

    def group_up(self, message: Hello, connection: Link) -> None:
        """The later engine of a group stays: one that hung may return after its replacement."""
        name, now = message.group, self.clock()
        former = self._groups.get(name)
        if former is not None and former.started_ns > message.started_ns:
            _replace(name, connection)
            return
        if former is not None:
            self.group_down(name, former.connection)
            if former.started_ns < message.started_ns:
                _replace(name, former.connection)
            else:
                former.connection.close()
        logger.info(
            "group %s is up with %d leases", name, len(message.leases), extra=about(group=name)
        )
        self._groups[name] = _Group(
            name, connection, message.info, message.address, message.started_ns
        )
        self.settle(self.router.group_up(name, message.info, message.leases, now))
        self.account(name, AccountNews(message.update, message.pages))

    def serves(self, name: str, connection: Link) -> bool:
        """Whether the group's engine is at the other end, and no later one."""
        group = self._groups.get(name)
        return group is not None and group.connection is connection

    def group_down(self, name: str, connection: Link) -> None:
        if not self.serves(name, connection):
            return
        logger.warning("group %s is down", name, extra=about(group=name))
        del self._groups[name]
        self.settle(self.router.group_down(name, self.clock()))
        self._reports.reported(name)
        self._answer_reported(self.clock())

    def account(self, name: str, message: AccountNews) -> None:
        now = self.clock()
        pages = message.pages
        if pages.held or pages.dropped:
            self.router.fleet.pages_changed(name, pages.held, pages.dropped)
        if message.update:
            self.settle(self.router.account(name, message.update, now))

    def report(self, name: str, message: Report) -> None:
        self._reports.latest[name] = message.report
        if message.report.draining:
            self.router.group_drains(name)
        if message.audited:
            self._reports.audits += 1
            if faults := self.router.audit(name, message.report.loads):
                self._reports.audit_faults += 1
                words = "; ".join(faults)
                logger.error(
                    "group %s and the ledger disagree: %s", name, words, extra=about(group=name)
                )
        self._reports.reported(name)
        self._answer_reported(self.clock())

    # Within

    def settle(self, outcomes: Iterable[Outcome]) -> None:
        """Send each outcome to the caller or the engine that it concerns."""
        for outcome in outcomes:
            match outcome:
                case Granted(placement=placement):
                    self._granted(placement)
                case Refused(request_id=name, error=error):
                    wire = to_wire(error)
                    self._meters.refused(wire, reason_label(wire))
                    self._refused(name, Failure.of(error))
                case Grown(group=group, lease=lease):
                    self._groups[group].connection.send(Extend((lease,)))
                case Withdrawn(group=group, lease_id=lease_id):
                    self._groups[group].connection.send(Withdraw((lease_id,)))
                case Enqueued(request_id=name):
                    self.callers.inform([outcome], self.clock())

    def _granted(self, placement: Placement) -> None:
        caller = self.callers.take(placement.request_id)
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
        caller = self.callers.take(name)
        caller.peer.send(CallFailed(caller.call, failure))
        for decided in self.router.explain(name, self.clock())[-1:]:
            logger.info("request %s: %s", name, "\n".join(decided.lines()), extra=about(name))

    def _answer_reported(self, now: float) -> None:
        if self._reports.due(now):
            self._reports.answer(self.status(), now)


def _replace(name: str, connection: Link) -> None:
    logger.warning("an engine of group %s has been replaced", name, extra=about(group=name))
    connection.send(Replaced())
    connection.close()


class RouterPeer:
    """One connection: an engine's once it has sent Hello, otherwise an ingress's."""

    def __init__(self, service: RouterService, connection: Link) -> None:
        self._service = service
        self._connection = connection
        self._group = ""
        self.send = connection.send

    def received(self, message: object) -> None:
        service = self._service
        match message:
            case AccountNews() | Report() if not service.serves(self._group, self._connection):
                pass  # of an engine that was replaced, on its way before it heard of it
            case AccountNews():
                service.account(self._group, message)
            case Place():
                service.place(message, self)
            case Cancel(call=call):
                self._leave(call)
            case Release(lease_id=lease_id):
                service.release(lease_id)
            case Finished(lease_id=lease_id):
                service.router.finished(lease_id)
            case Report():
                service.report(self._group, message)
            case Abort(call=call, request_id=request_id):
                outcomes = service.router.abort(request_id, service.clock())
                service.settle(outcomes)
                self.send(Aborted(call, found=bool(outcomes)))
            case Drain():
                service.drain()
            case AskStatus():
                service.ask_status(message, self)
            case AskEstimate(call=call, request=request):
                self.send(
                    Estimated(call, service.router.admission.estimate(request, service.clock()))
                )
            case AskTenant(call=call, tenant=tenant):
                self.send(TenantUse(call, service.router.tenant_status(tenant)))
            case AskExplanation(call=call, request_id=request_id):
                self.send(Decisions(call, service.router.explain(request_id, service.clock())))
            case Hello():
                self._group = message.group
                service.group_up(message, self._connection)

    def lost(self) -> None:
        if self._group:
            self._service.group_down(self._group, self._connection)
        for call in self._service.callers.calls_of(self):
            self._leave(call)

    def _leave(self, call: int) -> None:
        """The caller no longer waits. A placement already on its way comes back as a Release."""
        service = self._service
        if (name := service.callers.leave(self, call)) is not None:
            service.settle(service.router.cancel(name, service.clock()))

    def fail(self, call: int, failure: Failure) -> None:
        self.send(CallFailed(call, failure))
