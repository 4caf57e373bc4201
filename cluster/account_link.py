"""An engine's connection to the router, over which both keep the account of leases.

    engine ── Hello, AccountNews, Report ──► router
           ◄── Extend, Withdraw, AskReport, Replaced ──

A new connection starts with everything; after that, changes are sent in batches.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from kvmesh.cluster.identity import Identity
from kvmesh.cluster.link import Address, Link, stay_connected
from kvmesh.cluster.messages import (
    TO_ENGINE_FROM_ROUTER,
    AccountNews,
    AskReport,
    Extend,
    Hello,
    Replaced,
    Report,
    Withdraw,
)
from kvmesh.cluster.reports import EngineReport
from kvmesh.cluster.telemetry.gpus import Gpus
from kvmesh.cluster.telemetry.meters import EngineMeters
from kvmesh.workers.errors import EngineError
from kvmesh.workers.leader import EngineLeader

ACCOUNT_PERIOD_S = 0.02  # changes are collected for this long
WITHDRAWN_LIMIT = 4096


class AccountLink:
    """Reports a group's engine, and obeys the router.

    group: its name
    node: where it runs
    report_period_s: between two reports
    withdrawn: leases, oldest first; sequences of some may still arrive. Ids are never reused.
    draining: the engine accepts nothing new
    """

    def __init__(
        self,
        group: str,
        node: str,
        leader: EngineLeader,
        meters: EngineMeters,
        report_period_s: float,
    ) -> None:
        self._group = group
        self._node = node
        self._leader = leader
        self._meters = meters
        self._report_period_s = report_period_s
        self._started_ns = time.time_ns()
        self._connection: Link | None = None
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flushed_s = 0.0
        self._report_due = True
        self._tasks: list[asyncio.Task[None]] = []
        self.withdrawn: OrderedDict[str, None] = OrderedDict()
        self.draining = False

    def start(
        self,
        find: Callable[[], Awaitable[Address]],
        identity: Identity,
        engine: Address,
        gpus: Gpus,
    ) -> None:
        """Keep a connection until `leave`.

        find: where the router listens; raises LinkError while it is not known
        engine: where the engine listens for ingresses
        gpus: the group's
        """
        self._engine_address = engine
        self._gpus = gpus
        following = stay_connected(find, identity, TO_ENGINE_FROM_ROUTER, self._connected)
        self._tasks = [
            asyncio.create_task(following),
            asyncio.create_task(self._report_regularly()),
        ]

    @property
    def broken(self) -> bool:
        """Whether it no longer reports, though it has not left."""
        return any(task.done() and not task.cancelled() for task in self._tasks)

    def leave(self) -> None:
        """Disconnect for good, so that requests move to other groups at once."""
        for task in self._tasks:
            task.cancel()
        self._flush()
        if self._connection is not None:
            self._connection.close()

    def report_now(self) -> None:
        self._report_due = True
        self._flush(report_anyway=True)

    def changed(self) -> None:
        """The account has changed: send it soon, together with what follows."""
        if self._leader.failed is not None:
            self.leave()
            return
        self._meters.steps(self._leader.account.take_steps())
        if self._flush_timer is None:
            loop = asyncio.get_running_loop()
            wait_s = max(self._flushed_s + ACCOUNT_PERIOD_S - loop.time(), 0.0)
            self._flush_timer = loop.call_later(wait_s, self._flush_due)

    # The connection and its handler

    def _connected(self, router: Link) -> AccountLink:
        """Send the whole account."""
        account = self._leader.account
        router.send(
            Hello(
                self._group,
                self._started_ns,
                self._node,
                self.draining,
                account.info,
                self._engine_address,
                account.book.leases,
                account.book.restate(),
                account.blocks.restate(),
            )
        )
        self._connection = router
        self.report_now()
        return self

    def received(self, message: Extend | Withdraw | AskReport | Replaced) -> None:
        match message:
            case Extend(leases=leases):
                for lease in leases:
                    self._leader.extend(lease)
            case Withdraw(lease_ids=lease_ids):
                self.withdraw(lease_ids)
            case AskReport():
                self.report_now()
            case Replaced():
                error = EngineError("another engine has replaced it, because it hung")
                self._leader.engine_failed(error)

    def lost(self) -> None:
        self._connection = None

    def withdraw(self, lease_ids: tuple[str, ...]) -> None:
        for lease_id in lease_ids:
            self.withdrawn[lease_id] = None
            self._leader.withdraw(lease_id)
        while len(self.withdrawn) > WITHDRAWN_LIMIT:
            self.withdrawn.popitem(last=False)

    # Within

    def _flush_due(self) -> None:
        self._flush_timer = None
        self._flush()

    def _flush(self, *, report_anyway: bool = False) -> None:
        router = self._connection
        if router is None or self._leader.failed is not None:
            return  # the next Hello sends everything
        self._flushed_s = asyncio.get_running_loop().time()
        account = self._leader.account
        update, pages = account.book.take_update(), account.blocks.take_changes()
        if update or pages.held or pages.dropped:
            router.send(AccountNews(update, pages))
        # Loads match the account only while nothing has changed since they were made.
        audited = account.loads_current
        if self._report_due and (audited or report_anyway):
            self._report_due = False
            latencies = self._meters.latencies()
            report = EngineReport(account.info, account.loads, latencies, self.draining)
            router.send(Report(report, audited))

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._report_period_s)
            if self._leader.failed is None:
                await self._measure()
            self._report_due = True
            self._flush()

    async def _measure(self) -> None:
        account, leader = self._leader.account, self._leader
        self._meters.report(
            account.info,
            account.loads,
            step_age_s=leader.step_age_s,
            connected=self._connection is not None,
        )
        self._meters.gpus(await asyncio.to_thread(self._gpus.read))
