"""The router as a service: follows the engines, and knows every live request by its id."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from kvmesh.cluster.ingress.attempt import sequence_id
from kvmesh.cluster.ingress.errors import DrainingError, EngineLostError, RequestAbortedError
from kvmesh.cluster.metrics import RouterMeters
from kvmesh.cluster.peers import ClusterStatus, EngineClient, EngineReport, Explained
from kvmesh.cluster.routing.aio import AsyncRouter
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import DuplicateRequestError, RoutingError
from kvmesh.cluster.routing.explain import explain
from kvmesh.cluster.routing.request import Estimate, Growth, Placement, PlaceRequest
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.verdict import NO_VERDICTS
from kvmesh.workers.errors import EngineError

logger = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Live:
    """A request that waits, or holds a lease.

    ticket: of the call that placed it
    aborted: while it waited
    """

    ticket: str
    sequences: int
    placement: Placement | None = None
    aborted: bool = False


class RouterService:
    """Implements `peers.RouterClient` over an AsyncRouter.

    engines: every group's engine, by the group's name
    clock: seconds, monotonic
    """

    def __init__(
        self,
        engines: Mapping[str, EngineClient],
        config: RouterConfig,
        meters: RouterMeters,
        *,
        report_period_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engines = engines
        # Greater than any former router's: leases say under which one they were granted.
        epoch = time.time_ns() // 1_000_000
        router = Router(config, epoch, clock(), expected_groups=tuple(engines))
        self._ledger = router.ledger
        self._router = AsyncRouter(router, clock)
        self._clock = clock
        self._grace_s = config.grace_s
        self._over_since: dict[str, float] = {}
        self._meters = meters
        self._report_period_s = report_period_s
        self._reports: dict[str, EngineReport] = {}
        self._healthy: set[str] = set()
        self._page_versions: dict[str, int] = {}
        self._live: dict[str, _Live] = {}
        self._by_lease: dict[str, str] = {}
        self._totals: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._draining = False

    # Requests

    async def place(
        self, request: PlaceRequest, *, ticket: str, supersede: bool = False
    ) -> Placement:
        """See RouterClient; also raises RequestAbortedError."""
        if self._draining and not request.resumed:
            raise DrainingError()
        key = request.request_id
        if key in self._live and not self._is_over(self._live[key]):
            if not supersede:
                raise DuplicateRequestError(key.partition("/")[2])
            await self._end(key)
        live = self._live[key] = _Live(ticket, request.sequences)
        try:
            placement = await self._router.place(request)
        except asyncio.CancelledError:
            self._forget(key, live)
            if live.aborted:
                raise RequestAbortedError() from None
            raise
        except RoutingError as error:
            self._forget(key, live)
            self._refused[type(error).__name__] += 1
            self._log_refusal(key)
            raise
        if live.aborted:  # in the moment between its grant and now
            self._forget(key, live)
            await self._router.release(placement.lease.lease_id)
            raise RequestAbortedError()
        live.placement = placement
        self._by_lease[placement.lease.lease_id] = key
        self._totals["granted"] += 1
        # They are many, and stay here for `explain`.
        return replace(placement, verdicts=NO_VERDICTS)

    async def begun(self, lease_id: str) -> None:
        await self._router.begun(lease_id)

    async def grow(self, lease_id: str, request: PlaceRequest, output_tokens: int) -> Growth | None:
        return await self._router.grow(lease_id, request, output_tokens)

    async def release(self, lease_id: str, output_tokens: int | None = None) -> None:
        await self._end_lease(lease_id, output_tokens)

    async def _end_lease(self, lease_id: str, output_tokens: int | None) -> None:
        key = self._by_lease.pop(lease_id, None)
        if key is not None:
            self._totals["released"] += 1
            if self._holds(key, lease_id):
                del self._live[key]
        await self._router.release(lease_id, output_tokens)

    async def abort(self, request_id: str) -> bool:
        return await self._end(request_id)

    async def withdraw(self, request_id: str, ticket: str) -> None:
        live = self._live.get(request_id)
        # The id may be another request's by now.
        if live is not None and live.ticket == ticket:
            await self._end(request_id)

    async def explain(self, request_id: str) -> tuple[Explained, ...]:
        return tuple(
            Explained(age_s, decided.in_words(), decided.group, decided.verdicts)
            for age_s, decided in self._router.explain(request_id)
        )

    async def estimate(self, request: PlaceRequest) -> Estimate:
        return await self._router.estimate(request)

    async def drain(self) -> None:
        """Take nothing new; every ingress learns it from the status."""
        self._draining = True

    async def _end(self, key: str) -> bool:
        """End a request: out of the queue, or its sequences on their engine.

        What has not reached the engine yet is refused there when it comes.
        """
        live = self._live.get(key)
        if live is None:
            return False
        if live.placement is None:
            live.aborted = True
            await self._router.cancel(key)
            return True
        lease_id = live.placement.lease.lease_id
        ids = [sequence_id(lease_id, index) for index in range(live.sequences)]
        try:
            ended = await self._engines[live.placement.group].abort(ids)
        except (EngineLostError, EngineError):
            ended = 0
        if ended:
            # Its ingress, which sees the pages freed, gives the lease back; if it is gone,
            # the engine's next report will do.
            self._ledger.handed(lease_id, self._clock())
        else:
            # Its ingress has not submitted it, and perhaps never will: it may be gone.
            await self._end_lease(lease_id, None)
        return True

    def _log_refusal(self, key: str) -> None:
        for _, decided in self._router.explain(key)[-1:]:
            lines = explain(f"request {key}: {decided.in_words()}", decided.verdicts)
            logger.info("%s", "\n".join(lines))

    def _forget(self, key: str, live: _Live) -> None:
        if self._live.get(key) is live:
            del self._live[key]

    # Groups

    async def suspect(self, group: str, epoch: str) -> None:
        report = self._reports.get(group)
        if report is not None and report.info.epoch == epoch and group in self._healthy:
            await self._down(group)

    async def follow(self) -> None:
        """Ask every engine for its report, again and again; runs until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._report_period_s)

    async def refresh(self) -> None:
        """Ask every engine once, and let time pass in the ledger."""
        await asyncio.gather(*(self._refresh_group(group) for group in self._engines))
        await self._router.sweep()
        self._drop_ended()
        status = self._router.snapshot()
        self._meters.status(
            status.queue_depth,
            status.leases,
            {group.group: group.used_bytes for group in status.groups},
            len(self._healthy),
        )

    async def status(self, *, fresh: bool = False) -> ClusterStatus:
        if fresh:
            await self.refresh()
        return ClusterStatus(
            router=self._router.snapshot(),
            reports=dict(self._reports),
            healthy=frozenset(self._healthy),
            live_requests=sum(not self._is_over(live) for live in self._live.values()),
            draining=self._draining,
            granted_total=self._totals["granted"],
            released_total=self._totals["released"],
            expired_total=self._totals["expired"],
            refused_total=dict(self._refused),
            audits_total=self._totals["audits"],
            audit_faults_total=self._totals["audit faults"],
        )

    async def _refresh_group(self, group: str) -> None:
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                known_pages = self._page_versions.get(group, 0)
                report, changes = await self._engines[group].report(known_pages)
        except (EngineLostError, EngineError, TimeoutError) as error:
            if group in self._healthy:
                logger.warning("group %s does not report: %s", group, error or "timeout")
                await self._down(group)
            return
        if report.draining:
            self._reports[group] = report
            await self._down(group)
            return
        known = self._reports.get(group)
        self._reports[group] = report
        if group not in self._healthy or known is None or known.info.epoch != report.info.epoch:
            self._healthy.add(group)
            self._page_versions.pop(group, None)  # counts anew, and so do we
            await self._router.group_up(group, report.info)
        else:
            self._page_versions[group] = changes.version
            await self._router.pages_changed(group, changes.held, changes.dropped)
        reconciled = await self._router.report(group, report.loads)
        self._totals["audits"] += 1
        if reconciled.faults:
            self._totals["audit faults"] += 1
            logger.error("group %s and the ledger disagree: %s", group, reconciled.faults)

    async def _down(self, group: str) -> None:
        self._healthy.discard(group)
        await self._router.group_down(group)

    def _drop_ended(self) -> None:
        """Forget requests whose lease the ledger ended without us: expired, or vanished.

        Not at once: an engine's report that a sequence has ended is often a moment ahead
        of its ingress, which is about to say so.
        """
        now = self._clock()
        over = [lease_id for lease_id in self._by_lease if lease_id not in self._ledger.leases]
        self._over_since = {lease_id: self._over_since.get(lease_id, now) for lease_id in over}
        for lease_id, since in list(self._over_since.items()):
            if now - since >= self._grace_s:
                key = self._by_lease.pop(lease_id)
                if self._holds(key, lease_id):
                    del self._live[key]
                self._totals["expired"] += 1

    def _is_over(self, live: _Live) -> bool:
        """Whether its lease has ended, and nobody but the ledger has noticed so far."""
        placement = live.placement
        return placement is not None and placement.lease.lease_id not in self._ledger.leases

    def _holds(self, key: str, lease_id: str) -> bool:
        """Whether the lease is the request's latest; an older one may end after it."""
        live = self._live.get(key)
        placement = live.placement if live is not None else None
        return placement is not None and placement.lease.lease_id == lease_id
