"""The ingress's connection to the router.

async with link.place(request) as held:
    ...                      # leaving here gives the lease back
    held.submitted = True    # from here on the engine ends it
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from kvmesh.cluster.errors import NotReadyError
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.link import Address, Link, stay_connected
from kvmesh.cluster.messages import (
    TO_INGRESS_FROM_ROUTER,
    Abort,
    Aborted,
    AskEstimate,
    AskExplanation,
    AskStatus,
    AskTenant,
    CallFailed,
    Cancel,
    Decisions,
    Drain,
    Estimated,
    Finished,
    Place,
    Placed,
    Release,
    Status,
    TenantUse,
    Waiting,
)
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.cluster.routing.outcome import BudgetEstimate, Explained, TenantStatus
from kvmesh.cluster.routing.request import Past, PlaceRequest

ANSWER_TIMEOUT_S = 15.0
PLACE_GRACE_S = 0.5  # the router refuses a place itself in time, and says more
MIN_TIMEOUT_S = 1e-3


@dataclass(slots=True)
class HeldPlace:
    """A lease, which the ingress holds until it submits sequences under it."""

    placed: Placed
    submitted: bool = False


@dataclass(slots=True)
class _Call:
    """One that has no answer yet.

    on_waiting: called with every Waiting before the answer
    due_s: when a place is of no use any more, on the event loop's clock
    sent: over a connection, which may be lost by now
    waits: a router has said so
    """

    message: Any
    answer: asyncio.Future[Any]
    on_waiting: Callable[[Waiting], None]
    due_s: float | None = None
    sent: bool = False
    waits: bool = False

    def send(self, connection: Link, now_s: float) -> None:
        """Over a first connection, or another one."""
        message = self.message
        if isinstance(message, Place):
            left_s = None if self.due_s is None else max(self.due_s - now_s, MIN_TIMEOUT_S)
            request = replace(message.request, timeout_s=left_s)
            if self.waits or (self.sent and request.past is not Past.AGAIN):
                # The same router may still know the request from the lost connection. What no
                # router may have heard yet still takes the place of an older incarnation.
                request = replace(request, past=max(request.past, Past.ACCEPTED))
            message = Place(message.call, request)
        connection.send(message)
        self.sent = True


def _ignore(waiting: Waiting) -> None: ...


class RouterLink:
    """Calls the router. Open calls are sent again when the connection was lost and is back.

    find: where the router listens; raises LinkError while it is not known
    """

    def __init__(self, identity: Identity, find: Callable[[], Awaitable[Address]]) -> None:
        self._identity = identity
        self._find = find
        self._numbers = itertools.count(1)
        self._open: dict[int, _Call] = {}
        self._connection: Link | None = None

    async def run(self) -> None:
        """Keep the connection; runs until cancelled."""
        await stay_connected(self._find, self._identity, TO_INGRESS_FROM_ROUTER, self._connected)

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @asynccontextmanager
    async def place(
        self, request: PlaceRequest, on_waiting: Callable[[Waiting], None] = _ignore
    ) -> AsyncIterator[HeldPlace]:
        """Wait for a lease; at the end it is given back unless sequences were submitted.

        on_waiting: called at once if the request has to wait, and again with news
        Raises the tree of routing/errors.py, DrainingError; NotReadyError if there is no answer
        when the request's `timeout_s` is over, as while there is no router.
        """
        due_s = ends_s = None
        if request.timeout_s is not None:
            due_s = asyncio.get_running_loop().time() + request.timeout_s
            ends_s = due_s + PLACE_GRACE_S
        try:
            async with asyncio.timeout_at(ends_s):
                held = HeldPlace(await self._placed(request, on_waiting, due_s))
        except TimeoutError:
            raise NotReadyError("the router does not answer") from None
        placed = held.placed
        try:
            yield held
        finally:
            over = Finished if held.submitted else Release
            self._send(over(placed.lease.lease_id))

    async def abort(self, request_id: str) -> bool:
        """End a request, waiting or running. Returns False if there is none.

        request_id: tenant/id
        """
        answer = await self._ask_soon(Abort(next(self._numbers), request_id))
        assert isinstance(answer, Aborted)
        return answer.found

    async def estimate(self, request: PlaceRequest) -> BudgetEstimate:
        answer = await self._ask_soon(AskEstimate(next(self._numbers), request))
        assert isinstance(answer, Estimated)
        return answer.estimate

    async def explain(self, request_id: str) -> tuple[Explained, ...]:
        answer = await self._ask_soon(AskExplanation(next(self._numbers), request_id))
        assert isinstance(answer, Decisions)
        return answer.decisions

    async def tenant(self, tenant: str) -> TenantStatus:
        answer = await self._ask_soon(AskTenant(next(self._numbers), tenant))
        assert isinstance(answer, TenantUse)
        return answer.status

    async def status(self, *, fresh: bool = False) -> ClusterStatus:
        """fresh: ask every engine first. Raises NotReadyError."""
        answer = await self._ask_soon(AskStatus(next(self._numbers), fresh))
        assert isinstance(answer, Status)
        return answer.status

    def drain(self) -> None:
        """Make the connected router refuse new requests."""
        self._send(Drain())

    # Within

    async def _placed(
        self, request: PlaceRequest, on_waiting: Callable[[Waiting], None], due_s: float | None
    ) -> Placed:
        call = next(self._numbers)
        answer = self._ask(Place(call, request), on_waiting, due_s)
        try:
            placed = await answer
        except asyncio.CancelledError:
            if answer.cancelled():
                self._send(Cancel(call))
            elif answer.exception() is None:  # placed as this task was cancelled
                self._send(Release(answer.result().lease.lease_id))
            raise
        assert isinstance(placed, Placed)
        return placed

    async def _ask_soon(self, message: Any) -> Any:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._ask(message)
        except TimeoutError:
            raise NotReadyError("the router does not answer") from None

    def _ask(
        self,
        message: Any,
        on_waiting: Callable[[Waiting], None] = _ignore,
        due_s: float | None = None,
    ) -> asyncio.Future[Any]:
        """A future of the answer; cancelling it forgets the call."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call = self._open[message.call] = _Call(message, answer, on_waiting, due_s)
        answer.add_done_callback(lambda _: self._open.pop(message.call))
        if self._connection is not None:
            call.send(self._connection, asyncio.get_running_loop().time())
        return answer

    def _send(self, message: Any) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def _connected(self, connection: Link) -> RouterLink:
        """Send the open calls, which this router may not know."""
        self._connection = connection
        now_s = asyncio.get_running_loop().time()
        for call in self._open.values():
            call.send(connection, now_s)
        return self

    # The connection's handler

    def received(self, message: Any) -> None:
        call = self._open.get(message.call)
        if call is None or call.answer.done():
            if isinstance(message, Placed):  # its caller has left
                self._send(Release(message.lease.lease_id))
        elif isinstance(message, Waiting):
            call.waits = True
            call.on_waiting(message)
        elif isinstance(message, CallFailed):
            call.answer.set_exception(message.failure.error)
        else:
            call.answer.set_result(message)

    def lost(self) -> None:
        self._connection = None
