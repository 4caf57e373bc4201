"""One output stream for each (ingress, engine) pair, and the mailboxes it fills.

A sequence's deltas wait in the mailbox of its request until the request's
task takes all of them at once: what is ready is sent together.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from kvmesh.cluster.ingress.errors import EngineLostError
from kvmesh.cluster.peers import EngineClient, StreamOpened
from kvmesh.workers.errors import EngineError
from kvmesh.workers.request import EngineRequest, LeaseTerms, SequenceDelta

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0


def spawn(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """A task in a fresh context: it outlives the call that happens to start it."""
    loop = asyncio.get_running_loop()
    return loop.create_task(coroutine, name=name, context=contextvars.Context())


class Mailbox:
    """Deltas of one request's sequences, in order, until somebody takes them.

    watch: told of each as it comes, however long it then waits here
    """

    def __init__(self, watch: Callable[[SequenceDelta], None]) -> None:
        self._watch = watch
        self._deltas: list[SequenceDelta] = []
        self._lost = False
        self._ready = asyncio.Event()

    def put(self, delta: SequenceDelta) -> None:
        self._deltas.append(delta)
        self._ready.set()
        self._watch(delta)

    def lose(self) -> None:
        """The engine is gone; what is here can still be taken."""
        self._lost = True
        self._ready.set()

    async def take(self) -> list[SequenceDelta]:
        """All deltas there are, at least one; EngineLostError when none will come."""
        await self._ready.wait()
        if not self._deltas:
            raise EngineLostError()
        deltas, self._deltas = self._deltas, []
        if not self._lost:
            self._ready.clear()
        return deltas


class EngineLink:
    """Submits sequences to one engine and hands their deltas to mailboxes.

    client_name: of this ingress process; every new stream adds a number to it, so
        that closing an old stream never ends a new one's sequences
    """

    def __init__(self, engine: EngineClient, client_name: str) -> None:
        self._engine = engine
        self._client_name = client_name
        self._numbers = itertools.count()
        self._mailboxes: dict[str, Mailbox] = {}
        self._opening: asyncio.Task[str] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._client_id = ""

    async def submit(self, request: EngineRequest, mailbox: Mailbox) -> str:
        """Send one sequence; its deltas go to `mailbox`. `request.client_id` is filled in here.

        Returns the epoch of the engine that took it. Raises CapacityError,
        InvalidRequestError, EngineLostError.
        """
        epoch = await self._open()
        self._mailboxes[request.request_id] = mailbox
        try:
            await self._engine.submit(replace(request, client_id=self._client_id), epoch)
        except BaseException:
            self._mailboxes.pop(request.request_id, None)
            raise
        return epoch

    async def abort(self, request_ids: list[str]) -> None:
        """Ask the engine to end sequences; their last deltas come as any other."""
        live = [request_id for request_id in request_ids if request_id in self._mailboxes]
        if live:
            await self._engine.abort(live)

    async def extend(self, request_ids: list[str], lease: LeaseTerms) -> None:
        """Tell the engine that the sequences' lease has grown; `lease` is each one's part."""
        await self._engine.extend(request_ids, lease)

    async def close(self) -> None:
        """Close the stream, which ends all of its sequences."""
        for task in (self._opening, self._reader):
            if task is not None:
                task.cancel()
        await asyncio.gather(
            *(task for task in (self._opening, self._reader) if task), return_exceptions=True
        )
        self._lose_all()

    async def _open(self) -> str:
        """The epoch behind the open stream, opening it if need be."""
        if self._opening is None:
            self._opening = spawn(self._connect(), "engine-link-open")
        opening = self._opening
        try:
            # Shielded: it is everybody's stream, not only this request's.
            return await asyncio.shield(opening)
        except EngineLostError:
            if self._opening is opening:
                self._opening = None
            raise

    async def _connect(self) -> str:
        self._client_id = f"{self._client_name}/{next(self._numbers)}"
        opened: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = spawn(self._read(self._client_id, opened), "engine-link-read")
        try:
            return await asyncio.wait_for(opened, OPEN_TIMEOUT_S)
        except TimeoutError:
            # Waited for, or its end would be taken for the end of the next stream.
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            raise EngineLostError() from None

    async def _read(self, client_id: str, opened: asyncio.Future[str]) -> None:
        stream = self._engine.outputs(client_id)
        try:
            async for message in stream:
                if isinstance(message, StreamOpened):
                    opened.set_result(message.epoch)
                else:
                    self._deliver(message)
        except (EngineLostError, EngineError) as error:
            logger.warning("the output stream of an engine ended: %s", error)
        finally:
            if not opened.done():
                opened.set_exception(EngineLostError())
                opened.exception()  # read, so that asyncio does not complain of it
            self._lose_all()
            self._opening = None
            await stream.aclose()

    def _deliver(self, deltas: list[SequenceDelta]) -> None:
        for delta in deltas:
            if delta.finish_reason is None:
                mailbox = self._mailboxes.get(delta.request_id)
            else:
                mailbox = self._mailboxes.pop(delta.request_id, None)
            if mailbox is not None:
                mailbox.put(delta)

    def _lose_all(self) -> None:
        mailboxes, self._mailboxes = self._mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.lose()
