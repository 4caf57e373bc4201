"""The router as a process of a cluster: messages in, the pure router, messages out.

No call blocks. A request that waits for pages has an entry in `callers`, and the outcome that
ends its wait is sent there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType

from kvmesh.cluster.errors import DrainingError, Failure
from kvmesh.cluster.group_connections import GroupConnections
from kvmesh.cluster.ingress.error_table import reason_label, to_wire
from kvmesh.cluster.link import Link
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
    Report,
    Status,
    TenantUse,
    Withdraw,
)
from kvmesh.cluster.report_book import ReportBook
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import RoutingError
from kvmesh.cluster.routing.group import name_order
from kvmesh.cluster.routing.outcome import (
    Enqueued,
    Granted,
    Grown,
    Outcome,
    Placement,
    Refused,
    Withdrawn,
)
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.status import router_status, tenant_status
from kvmesh.cluster.telemetry.logs import about
from kvmesh.cluster.telemetry.meters import RouterMeters
from kvmesh.cluster.waiting_callers import WaitingCaller, WaitingCallers

logger = logging.getLogger(__name__)

TICK_S = 0.25
INFORM_PERIOD_S = 1.0  # how often waiting callers learn what has changed
MEASURE_PERIOD_S = 1.0


class RouterService:
    """The one router of a cluster.

    groups: names of the groups that are expected to be up
    configured: of all groups, those that may be added later included; `groups` if None
    clock: seconds, monotonic
    divergence_nats: of KV formats on the model, as the operator has measured it
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
        divergence_nats: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        # Greater than any former router's; every lease carries the epoch of its router.
        epoch = time.time_ns() // 1_000_000
        self.router = Router(config, epoch, clock(), expected_groups=groups)
        self.clock = clock
        self._meters = meters
        self._configured = tuple(groups if configured is None else configured)
        self.callers = WaitingCallers()
        self._informed_s = self._measured_s = clock()
        self.reports = ReportBook()
        self.groups = GroupConnections(
            self.router,
            self.reports,
            self._configured,
            groups,
            self.settle,
            clock,
            divergence_nats,
        )
        self._draining = False
        self.on_refused: Callable[[RoutingError], None] = lambda _: None

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
        self.answer_reported()
        if self.callers and now - self._informed_s >= INFORM_PERIOD_S:
            self._informed_s = now
            self.callers.inform(self.router.admission.standings(now), now)
        if now - self._measured_s >= MEASURE_PERIOD_S:
            self._measured_s = now
            tenants = {name: tenant_status(self.router, name) for name in self._meters.tenants}
            self._meters.status(self.status(), self._configured, self.groups.expected, tenants)

    def drain(self) -> None:
        """Accept nothing new; ingresses see it in the status."""
        self._draining = True

    def status(self) -> ClusterStatus:
        now = self.clock()
        return ClusterStatus(
            router=router_status(self.router, now),
            reports=dict(sorted(self.reports.latest.items(), key=lambda x: name_order(x[0]))),
            healthy=self.groups.names,
            draining=self._draining,
            audits_total=self.reports.audits,
            audit_faults_total=self.reports.audit_faults,
            requests=self.reports.requests(self.router.leases),
            missing=frozenset(self.router.fleet.missing),
            oldest_wait_s=self.callers.oldest_wait_s(now),
        )

    # Ingresses

    def place(self, message: Place, peer: RouterPeer) -> None:
        request = message.request
        name = request.request_id
        if self._draining and request.past < Past.ACCEPTED:
            peer.fail(message.call, Failure.of(DrainingError()))
            return
        if name in self.callers:
            if (error := self.router.conflict(request)) is not None:
                peer.fail(message.call, Failure.of(error))
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
        names = self.groups.names
        if not message.fresh or not names:
            peer.send(Status(message.call, self.status()))
            return
        self.reports.wait(peer, message.call, names, self.clock())
        for group in self.groups.all:
            group.connection.send(AskReport())

    def answer_reported(self) -> None:
        """Answer the status calls that have waited for reports, and have them or may no longer."""
        now = self.clock()
        if self.reports.due(now):
            self.reports.answer(self.status(), now)

    # Within

    def settle(self, outcomes: Iterable[Outcome]) -> None:
        """Send each outcome to the caller or the engine that it concerns."""
        for outcome in outcomes:
            match outcome:
                case Granted(placement=placement):
                    self._granted(placement)
                case Refused(request_id=name, error=error):
                    self.on_refused(error)
                    wire = to_wire(error)
                    self._meters.refused(wire, reason_label(wire))
                    self._refused(name, Failure.of(error))
                case Grown(group=group, lease=lease):
                    self.groups[group].connection.send(Extend((lease,)))
                case Withdrawn(group=group, lease_id=lease_id):
                    self.groups[group].connection.send(Withdraw((lease_id,)))
                case Enqueued(request_id=name):
                    self.callers.inform([outcome], self.clock())

    def _granted(self, placement: Placement) -> None:
        caller = self.callers.take(placement.request_id)
        group = self.groups[placement.group]
        caller.peer.send(
            Placed(
                caller.call,
                placement.group,
                group.info,
                group.address,
                placement.lease,
                placement.lease_bytes,
                placement.queue_s,
                placement.cached_tokens,
            )
        )

    def _refused(self, name: str, failure: Failure) -> None:
        caller = self.callers.take(name)
        caller.peer.send(CallFailed(caller.call, failure))
        for decided in self.router.records.explain(name, self.clock())[-1:]:
            logger.info("request %s: %s", name, "\n".join(decided.lines()), extra=about(name))


class RouterPeer:
    """One connection: an engine's once it has sent Hello, otherwise an ingress's."""

    def __init__(self, service: RouterService, connection: Link) -> None:
        self._service = service
        self._connection = connection
        self.send = connection.send

    def received(self, message: object) -> None:
        service, groups = self._service, self._service.groups
        group = groups.name_of(self._connection)
        match message:
            case AccountNews() | Report() if not group:
                pass  # of an engine that was replaced, on its way before it heard of it
            case AccountNews():
                groups.account(group, message)
            case Place():
                service.place(message, self)
            case Cancel(call=call):
                self._leave([call])
            case Release(lease_id=lease_id):
                service.release(lease_id)
            case Finished(lease_id=lease_id):
                service.router.finished(lease_id)
            case Report():
                groups.report(group, message)
                service.answer_reported()
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
                self.send(TenantUse(call, tenant_status(service.router, tenant)))
            case AskExplanation(call=call, request_id=request_id):
                self.send(
                    Decisions(call, service.router.records.explain(request_id, service.clock()))
                )
            case Hello():
                groups.up(message, self._connection)

    def lost(self) -> None:
        self._service.groups.down(self._connection)
        self._service.answer_reported()
        self._leave(self._service.callers.calls_of(self))

    def _leave(self, calls: Iterable[int]) -> None:
        """Their caller no longer waits. A placement already on its way comes back as a Release."""
        service = self._service
        left = (service.callers.leave(self, call) for call in calls)
        names = [name for name in left if name is not None]
        service.settle(service.router.cancel(names, service.clock()))

    def fail(self, call: int, failure: Failure) -> None:
        self.send(CallFailed(call, failure))
