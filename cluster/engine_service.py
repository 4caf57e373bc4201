"""An engine as a process of a cluster.

    ingresses ── Submit, End ──► [leader] ── Deltas ──► the ingress that submitted
                                    │
                                    └── Hello, AccountNews, Report ──► router
                                    ◄── Extend, Withdraw ──

Engine and router keep the account of leases together: the engine reports in batches what has
arrived, started, needs more pages or has ended. If an ingress's connection is lost, its
sequences are ended. If the router's is lost, the engine reconnects and sends everything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import numpy as np

from kvmesh.cluster.errors import EngineLostError, Failure
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.link import Address, Link, Listener, listen, stay_connected
from kvmesh.cluster.messages import (
    TO_ENGINE_FROM_INGRESS,
    TO_ENGINE_FROM_ROUTER,
    AccountNews,
    AskReport,
    Deltas,
    End,
    Extend,
    Hello,
    NewSequence,
    Rejected,
    Replaced,
    Report,
    Submit,
    Withdraw,
)
from kvmesh.cluster.metrics import EngineMeters
from kvmesh.cluster.reports import EngineReport
from kvmesh.cluster.routing.errors import RequestAbortedError
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import EngineDrainingError, EngineError, WorkerDiedError
from kvmesh.workers.executor import Executor
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.request import EndReason, EngineRequest, SequenceDelta, TokenIds

logger = logging.getLogger(__name__)

ACCOUNT_PERIOD_S = 0.02  # changes are collected for this long
WITHDRAWN_LIMIT = 4096


class EngineService:
    """One group's engine.

    group: its name
    host: address of this node, to listen on
    find_router: where the router listens; raises LinkError while it is not known
    report_period_s: between two reports to the router
    """

    def __init__(
        self,
        group: str,
        config: EngineConfig,
        executor: Executor,
        meters: EngineMeters,
        identity: Identity,
        find_router: Callable[[], Awaitable[Address]],
        *,
        host: str = "127.0.0.1",
        report_period_s: float = 1.0,
    ) -> None:
        self.leader = EngineLeader(config, executor, self._changed)
        self._group = group
        self._meters = meters
        self._identity = identity
        self._find_router = find_router
        self._host = host
        self._report_period_s = report_period_s
        self._router: Link | None = None
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flushed_s = 0.0
        self._report_due = True
        self._draining = False
        # Withdrawn leases, oldest first: sequences of some may still arrive. Ids are never reused.
        self._withdrawn: OrderedDict[str, None] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: Listener | None = None
        self._started_ns = 0

    # Life

    async def start(self) -> None:
        """Wait until the ranks have loaded, then serve; raises what kept them from it."""
        await self.leader.start()
        self._started_ns = time.time_ns()
        self._meters.loads(self.leader.info(), self.leader.loads())
        self._listener = await listen(
            self._host, self._identity, TO_ENGINE_FROM_INGRESS, lambda c: _Ingress(self, c)
        )
        following = stay_connected(
            self._find_router, self._identity, TO_ENGINE_FROM_ROUTER, lambda c: _Router(self, c)
        )
        self._tasks = [
            asyncio.create_task(following),
            asyncio.create_task(self._report_regularly()),
        ]

    def check_health(self) -> None:
        """Raises EngineLostError when the engine has failed, so that it is replaced."""
        if self.leader.failed is not None:
            raise EngineLostError()

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing new and let running sequences end, for at most this long."""
        self._draining = True
        self.report_now()
        try:
            async with asyncio.timeout(timeout_s):
                await self.leader.drain()
        except TimeoutError:
            pass  # the rest is aborted when the engine stops

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await self.leader.stop()

    # Ingresses

    def submit(self, message: Submit, ingress: _Ingress) -> None:
        """Accept all sequences of a lease, or reject them.

        A leader that drains or has failed counts as lost, so that the request moves elsewhere.
        """
        lease_id = message.lease.lease_id
        try:
            if lease_id in self._withdrawn:
                raise RequestAbortedError()
            self.leader.submit([_request(message, x) for x in message.sequences], ingress.deliver)
        except (EngineDrainingError, WorkerDiedError):
            ingress.reject(lease_id, Failure.of(EngineLostError()))
        except (EngineError, RequestAbortedError) as error:
            ingress.reject(lease_id, Failure.of(error))
        except Exception:
            # A bug that one request triggers must not end the others.
            logger.exception("internal error at the request of lease %s", lease_id)
            ingress.reject(lease_id, Failure.of(EngineError("internal error")))

    def end(self, request_ids: list[str], reason: EndReason) -> None:
        self.leader.abort(request_ids, reason)

    def count(self, deltas: list[SequenceDelta]) -> None:
        self._meters.deltas(deltas)

    # The router

    def greet(self, router: Link) -> None:
        """Send the whole account to a router that has just been connected."""
        assert self._listener is not None
        book, address = self.leader.book, self._listener.address
        router.send(
            Hello(
                self._group,
                self._started_ns,
                self.leader.info(),
                address,
                book.leases,
                book.restate(),
                self.leader.blocks.restate(),
            )
        )
        self._router = router
        self.report_now()

    def forget_router(self, router: Link) -> None:
        if self._router is router:
            self._router = None

    def withdraw(self, lease_ids: tuple[str, ...]) -> None:
        for lease_id in lease_ids:
            self._withdrawn[lease_id] = None
            self.leader.withdraw(lease_id)
        while len(self._withdrawn) > WITHDRAWN_LIMIT:
            self._withdrawn.popitem(last=False)

    def report_now(self) -> None:
        self._report_due = True
        self._flush(report_anyway=True)

    def _changed(self) -> None:
        """The leader has news: flush it soon, together with what follows."""
        if self.leader.failed is not None:
            self._leave_router()
        elif self._flush_timer is None:
            loop = asyncio.get_running_loop()
            wait_s = max(self._flushed_s + ACCOUNT_PERIOD_S - loop.time(), 0.0)
            self._flush_timer = loop.call_later(wait_s, self._flush_due)

    def _leave_router(self) -> None:
        """Disconnect a failed engine, so that requests move to other groups at once."""
        for task in self._tasks:
            task.cancel()
        if self._router is not None:
            self._router.close()

    def _flush_due(self) -> None:
        self._flush_timer = None
        self._flush()

    def _flush(self, *, report_anyway: bool = False) -> None:
        router = self._router
        if router is None or self.leader.failed is not None:
            return  # the next Hello sends everything
        self._flushed_s = asyncio.get_running_loop().time()
        leader = self.leader
        update, pages = leader.book.take_update(), leader.blocks.take_changes()
        if update or pages.held or pages.dropped:
            router.send(AccountNews(update, pages))
        # Loads match the account only while nothing has changed since they were made.
        audited = self.leader.loads_current
        if self._report_due and (audited or report_anyway):
            self._report_due = False
            router.send(Report(self._report(), audited))

    def _report(self) -> EngineReport:
        info, loads = self.leader.info(), self.leader.loads()
        self._meters.loads(info, loads)
        return EngineReport(info, loads, self._meters.latencies(), draining=self._draining)

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._report_period_s)
            self._report_due = True
            self._flush()


class _Ingress:
    """A connected ingress."""

    def __init__(self, service: EngineService, connection: Link) -> None:
        self._service = service
        self._connection = connection

    def received(self, message: Submit | End) -> None:
        match message:
            case Submit():
                self._service.submit(message, self)
            case End(request_ids=request_ids, reason=reason):
                self._service.end(request_ids, reason)

    def lost(self) -> None:
        self._service.leader.disconnect(self.deliver)

    def deliver(self, deltas: list[SequenceDelta]) -> None:
        self._service.count(deltas)
        self._connection.send(Deltas(deltas))

    def reject(self, lease_id: str, failure: Failure) -> None:
        self._connection.send(Rejected(lease_id, failure))


class _Router:
    """The connected router."""

    def __init__(self, service: EngineService, connection: Link) -> None:
        self._service = service
        self._connection = connection
        service.greet(connection)

    def received(self, message: Extend | Withdraw | AskReport | Replaced) -> None:
        match message:
            case Extend(leases=leases):
                for lease in leases:
                    self._service.leader.extend(lease)
            case Withdraw(lease_ids=lease_ids):
                self._service.withdraw(lease_ids)
            case AskReport():
                self._service.report_now()
            case Replaced():
                error = EngineError("another engine has replaced it, because it hung")
                self._service.leader.engine_failed(error)

    def lost(self) -> None:
        self._service.forget_router(self._connection)


def _request(message: Submit, sequence: NewSequence) -> EngineRequest:
    ids = _token_ids(message.prompt + sequence.output if sequence.output else message.prompt)
    return EngineRequest(
        request_id=sequence.request_id,
        prompt_token_ids=ids,
        params=sequence.params,
        lease=message.lease,
        resumed_tokens=len(sequence.output) // ids.itemsize,
        timeout_s=message.timeout_s,
        cache_salt=message.cache_salt,
    )


def _token_ids(data: bytes) -> TokenIds:
    return np.frombuffer(data, dtype="<i4").astype(np.int32, copy=False)
