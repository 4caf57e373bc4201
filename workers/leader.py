"""The leader of a group: an asyncio face over the engine's thread.

    submit, abort ──► commands ──► [engine thread: step, step, …] ──► deltas ──► outputs(client)

The engine has a thread of its own, so that a step never waits for the event
loop and the event loop never waits for a step. A client (an ingress replica)
reads all its sequences from one stream.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.errors import (
    CapacityError,
    DrainingError,
    EngineError,
    InvalidRequestError,
    WorkerDiedError,
)
from kvmesh.workers.executor import Executor
from kvmesh.workers.page_journal import PageJournal
from kvmesh.workers.request import (
    EngineInfo,
    EngineLoads,
    EngineRequest,
    FinishReason,
    LeaseTerms,
    PageChanges,
    SequenceDelta,
)
from kvmesh.workers.sizes import PageNeed

logger = logging.getLogger(__name__)

Command = Callable[[Engine], SequenceDelta | None]

# A client that submits must read its stream within this time, or it counts as gone.
_ATTACH_TIMEOUT_S = 10.0
# While sequences run, a report is made at most this often.
_LOADS_PERIOD_S = 0.05


@dataclass(slots=True)
class _Stream:
    """A client's undelivered deltas."""

    deltas: list[SequenceDelta] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    attached: bool = False


class EngineLeader:
    """Runs an Engine; all public methods belong to one event loop.

    `failed` is set when the engine cannot go on: every live sequence has then ended with
    FinishReason.ERROR, and the group must be built anew.
    """

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self._config = config
        self._executor = executor
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvmesh-engine", daemon=True)
        self._engine: Engine | None = None
        self._loads: EngineLoads | None = None
        self._loads_made_s = 0.0
        self._streams: dict[str, _Stream] = {}
        self._live: dict[str, EngineRequest] = {}
        self._journal = PageJournal()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.failed: Exception | None = None

    async def start(self) -> EngineInfo:
        """Wait until all ranks are ready. Raises what kept them from it."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._thread.start()
        return await self._started

    def info(self) -> EngineInfo:
        return self._ready().info

    def loads(self) -> EngineLoads:
        """The latest report: at most a step old, exact when idle."""
        self._ready()
        assert self._loads is not None
        return self._loads

    async def submit(self, request: EngineRequest) -> None:
        """Take a sequence; its deltas appear in `outputs(request.client_id)`.

        Raises InvalidRequestError, CapacityError (never fits, or its lease is more than what
        other leases leave), DrainingError, WorkerDiedError.
        """
        engine = self._ready()
        if self._draining:
            raise DrainingError("this group is shutting down")
        if request.request_id in self._live:
            raise InvalidRequestError("request_id", f"{request.request_id!r} is already running")
        engine.check(request)
        self._check_lease(engine, request)
        stream = self._streams.setdefault(request.client_id, _Stream())
        if not stream.attached:
            self._loop.call_later(_ATTACH_TIMEOUT_S, self._drop_unread, request.client_id, stream)
        self._live[request.request_id] = request
        self._idle.clear()
        self._commands.put(lambda engine: engine.add(request))

    async def abort(self, request_id: str) -> bool:
        """End a sequence within the step in flight; False when it is not live."""
        if request_id not in self._live:
            return False
        self._abort(request_id)
        return True

    async def extend(self, request_ids: Sequence[str], lease: LeaseTerms) -> None:
        """The lease of these sequences has grown; `lease` is each one's part. Ended ones need none.

        Not checked against other leases: the router grew it by its rules, and a sequence
        that was refused it would wait for ever.
        """
        for request_id in request_ids:
            request = self._live.get(request_id)
            if request is not None:
                self._live[request_id] = replace(request, lease=lease)
                self._commands.put(partial(_extend, request_id, lease))

    def page_changes(self, version: int) -> PageChanges:
        """What the prefix cache gained and lost after `version`; see PageJournal."""
        return self._journal.since(version)

    async def outputs(self, client_id: str) -> AsyncIterator[list[SequenceDelta]]:
        """Everything that is ready for a client, again and again, until it stops reading.

        Closing the iterator aborts all the client's sequences; a second iterator for the same
        client takes the stream over from the first.
        """
        stream = _Stream(attached=True)
        before = self._streams.get(client_id)
        self._streams[client_id] = stream
        if before is not None:
            stream.deltas = before.deltas
            before.ready.set()
            if stream.deltas:
                stream.ready.set()
        try:
            while self._streams.get(client_id) is stream:
                await stream.ready.wait()
                stream.ready.clear()
                deltas, stream.deltas = stream.deltas, []
                if deltas:
                    yield deltas
        finally:
            if self._streams.get(client_id) is stream:
                self._drop(client_id)

    async def drain(self) -> None:
        """Take nothing new, and wait until everything taken has ended."""
        self._draining = True
        await self._idle.wait()

    async def stop(self) -> None:
        """End the engine's thread and let the ranks go. Idempotent."""
        self._draining = True
        self._commands.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._executor.close)

    def _ready(self) -> Engine:
        if self.failed is not None:
            raise WorkerDiedError(f"the engine of this group has failed: {self.failed}")
        if self._engine is None:
            raise EngineError("the engine has not started yet")
        return self._engine

    def _check_lease(self, engine: Engine, request: EngineRequest) -> None:
        if request.lease is None:
            return
        held = PageNeed(0, 0)
        for other in self._live.values():
            if other.lease is not None:
                held += _charged(other.lease)
        wanted = _charged(request.lease)
        room = PageNeed(engine.info.hot_pages - held.hot, engine.info.sealed_pages - held.sealed)
        if not wanted.fits(room):
            needed, available = engine.geometry.bytes_of(wanted), engine.geometry.bytes_of(room)
            raise CapacityError(
                f"the lease asks for {needed:,} bytes of KV; other leases leave {available:,}",
                needed_bytes=needed,
                available_bytes=available,
                ever=True,
            )

    def _drop_unread(self, client_id: str, stream: _Stream) -> None:
        if self._streams.get(client_id) is stream and not stream.attached:
            logger.warning("client %s never read its stream: its sequences are aborted", client_id)
            self._drop(client_id)

    def _drop(self, client_id: str) -> None:
        del self._streams[client_id]
        for request in list(self._live.values()):
            if request.client_id == client_id:
                self._abort(request.request_id)

    def _abort(self, request_id: str) -> None:
        self._commands.put(lambda engine: engine.abort(request_id))

    def _deliver(self, deltas: list[SequenceDelta]) -> None:
        """On the event loop: hand deltas to their clients' streams."""
        for delta in deltas:
            request = self._live.get(delta.request_id)
            if request is None:
                continue
            if delta.finish_reason is not None:
                del self._live[delta.request_id]
            stream = self._streams.get(request.client_id)
            if stream is not None:
                stream.deltas.append(delta)
                stream.ready.set()
        if not self._live:
            self._idle.set()

    def _fail(self, error: Exception) -> None:
        """On the event loop: end everything that lives."""
        self.failed = error
        if not self._started.done():
            self._started.set_exception(error)
        self._deliver(
            [
                SequenceDelta(request_id, (), finish_reason=FinishReason.ERROR, error=str(error))
                for request_id in self._live
            ]
        )

    def _run(self) -> None:
        """The engine's thread."""
        try:
            engine = Engine(self._config, self._executor)
            self._report(engine)
            self._loop.call_soon_threadsafe(self._on_started, engine)
            while self._obey(engine):
                if deltas := engine.step():
                    self._publish(engine, deltas)
        except Exception as error:
            logger.exception("the engine failed")
            self._post(self._fail, error)

    def _on_started(self, engine: Engine) -> None:
        self._engine = engine
        if not self._started.done():
            self._started.set_result(engine.info)

    def _obey(self, engine: Engine) -> bool:
        """Carry out the commands that wait; with nothing to compute, wait for one.

        False ends the thread.
        """
        while True:
            patience_s = None
            if self._commands.empty():
                if engine.has_work and not engine.stalled:
                    return True
                if engine.has_work:
                    patience_s = engine.deadline_s()
                else:
                    engine.check_integrity()
                self._report(engine)
            try:
                command = self._commands.get(timeout=patience_s)
            except queue.Empty:
                return True
            if command is None:
                self._publish(engine, engine.abort_all())
                return False
            if (delta := command(engine)) is not None:
                self._publish(engine, [delta])

    def _publish(self, engine: Engine, deltas: list[SequenceDelta]) -> None:
        if not engine.has_work or time.monotonic() - self._loads_made_s > _LOADS_PERIOD_S:
            self._report(engine)
        self._post(self._deliver, deltas)

    def _report(self, engine: Engine) -> None:
        self._loads = engine.loads()
        self._loads_made_s = time.monotonic()
        if changes := engine.take_page_changes():
            self._post(self._journal.note, changes)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            logger.warning("the event loop ended before the engine")


def _extend(request_id: str, lease: LeaseTerms, engine: Engine) -> None:
    engine.extend(request_id, lease)


def _charged(lease: LeaseTerms) -> PageNeed:
    """What the lease adds to those before it."""
    return PageNeed(lease.hot_pages, lease.sealed_pages - lease.shared_sealed_pages)
