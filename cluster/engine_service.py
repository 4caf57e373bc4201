"""An engine leader as the control plane sees it: incarnations, meters, health."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from kvmesh.cluster.ingress.errors import EngineLostError, RequestAbortedError
from kvmesh.cluster.metrics import EngineMeters
from kvmesh.cluster.peers import EngineReport, StreamOpened
from kvmesh.workers.errors import DrainingError, WorkerDiedError
from kvmesh.workers.request import (
    EngineInfo,
    EngineLoads,
    EngineRequest,
    LeaseTerms,
    PageChanges,
    SequenceDelta,
)

ABORTED_LIMIT = 4096


class Leader(Protocol):
    """The surface of workers.leader.EngineLeader."""

    failed: Exception | None

    async def start(self) -> EngineInfo: ...

    async def submit(self, request: EngineRequest) -> None: ...

    async def abort(self, request_id: str) -> bool: ...

    async def extend(self, request_ids: Sequence[str], lease: LeaseTerms) -> None: ...

    def page_changes(self, version: int) -> PageChanges: ...

    def outputs(self, client_id: str) -> AsyncIterator[list[SequenceDelta]]: ...

    def info(self) -> EngineInfo: ...

    def loads(self) -> EngineLoads: ...

    async def drain(self) -> None: ...

    async def stop(self) -> None: ...


class EngineService:
    """Implements `peers.EngineClient` over a leader."""

    def __init__(self, leader: Leader, meters: EngineMeters) -> None:
        self._leader = leader
        self._meters = meters
        self._draining = False
        # Sequences that were not here when they were aborted, oldest first: most have ended,
        # some are on their way. Their ids are never used again.
        self._aborted: OrderedDict[str, None] = OrderedDict()

    async def start(self) -> EngineInfo:
        """Wait until the ranks have loaded; raises what kept them from it."""
        info = await self._leader.start()
        self._meters.loads(self._leader.loads())
        return info

    async def submit(self, request: EngineRequest, epoch: str) -> None:
        """See EngineClient. A leader that drains counts as lost: the request goes elsewhere.

        Raises RequestAbortedError for a sequence that was aborted before it came.
        """
        if request.request_id in self._aborted:
            raise RequestAbortedError()
        if self._leader.failed is not None or self._leader.info().epoch != epoch:
            raise EngineLostError()
        try:
            await self._leader.submit(request)
        except (DrainingError, WorkerDiedError):
            raise EngineLostError() from None

    async def abort(self, request_ids: Sequence[str]) -> int:
        ended = 0
        for request_id in request_ids:
            if await self._leader.abort(request_id):
                ended += 1
            else:
                self._aborted[request_id] = None
        while len(self._aborted) > ABORTED_LIMIT:
            self._aborted.popitem(last=False)
        return ended

    async def extend(self, request_ids: Sequence[str], lease: LeaseTerms) -> None:
        """See EngineClient."""
        await self._leader.extend(request_ids, lease)

    async def outputs(
        self, client_id: str
    ) -> AsyncGenerator[StreamOpened | list[SequenceDelta], None]:
        stream = self._leader.outputs(client_id)
        try:
            yield StreamOpened(self._leader.info().epoch)
            async for deltas in stream:
                for delta in deltas:
                    self._meters.delta(delta)
                yield deltas
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()

    async def report(self, pages_after: int = 0) -> tuple[EngineReport, PageChanges]:
        """See EngineClient. Raises EngineLostError once the engine has failed."""
        self.check_health()
        loads = self._leader.loads()
        self._meters.loads(loads)
        report = EngineReport(
            self._leader.info(), loads, self._meters.latencies(), draining=self._draining
        )
        return report, self._leader.page_changes(pages_after)

    def check_health(self) -> None:
        """Raises EngineLostError when the engine has failed, so that it is replaced."""
        if self._leader.failed is not None:
            raise EngineLostError()

    async def drain(self, timeout_s: float) -> None:
        """Let what runs end, for so long at most."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._leader.drain()
        except TimeoutError:
            pass  # what is left is aborted with the engine

    async def stop(self) -> None:
        await self._leader.stop()
