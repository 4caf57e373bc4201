"""An engine in a thread of its own: commands in, deltas and reports out.

The thread neither waits for the event loop nor makes it wait: commands go through a queue, and
what the engine has to say is posted to the loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, Self

from kvmesh.workers.engine import Engine
from kvmesh.workers.loads import EngineLoads, StepTime
from kvmesh.workers.request import SequenceDelta

logger = logging.getLogger(__name__)

# While sequences run, a report is made at most this often.
LOADS_PERIOD_S = 0.05
# All pages are audited when the engine has nothing to do, but at most this often: with 100,000
# pages it takes a tenth of a second, in which nothing starts.
AUDIT_PERIOD_S = 10.0

Command = Callable[[Engine], SequenceDelta | None]


class EngineNews(NamedTuple):
    """What an engine publishes from time to time.

    pages: cached blocks that were added or dropped since the last report
    steps: those since the last report
    """

    loads: EngineLoads
    pages: Mapping[bytes, bool]
    steps: list[StepTime]

    @classmethod
    def of(cls, engine: Engine) -> Self:
        pages = engine.scheduler.cache.take_changes()
        return cls(engine.loads(), pages, engine.stats.take_step_times())


class EngineListener(Protocol):
    """Called on the event loop, in the order in which the engine did it."""

    def engine_started(self, engine: Engine) -> None: ...

    def engine_output(self, deltas: list[SequenceDelta], report: EngineNews | None) -> None:
        """report: made after the deltas"""

    def engine_failed(self, error: Exception) -> None:
        """Nothing more will come."""


class EngineThread:
    """Makes an engine and runs its steps.

    make: called in the thread
    """

    def __init__(self, make: Callable[[], Engine], listener: EngineListener) -> None:
        self._make = make
        self._listener = listener
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvmesh-engine", daemon=True)
        self._loads_made_s = 0.0
        self._audited_s = -AUDIT_PERIOD_S

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def put(self, command: Command) -> None:
        """Run a command between two steps."""
        self._commands.put(command)

    async def stop(self) -> None:
        """End what runs, and the thread. Idempotent."""
        self._commands.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    # In the thread

    def _run(self) -> None:
        try:
            engine = self._make()
            self._post(self._listener.engine_started, engine)
            self._publish(engine, [])
            while self._obey(engine):
                if deltas := engine.step():
                    self._publish(engine, deltas)
        except Exception as error:
            logger.exception("the engine failed")
            self._post(self._listener.engine_failed, error)

    def _obey(self, engine: Engine) -> bool:
        """Run the queued commands; if there is nothing to compute, wait for one.

        Returns False to end the thread.
        """
        while True:
            if self._commands.empty():
                if engine.awaits_result or (engine.has_work and not engine.stalled):
                    return True
                if not engine.has_work:
                    self._audit(engine)
                self._publish(engine, [], report=True)
            try:
                command = self._commands.get(timeout=engine.deadline_s())
            except queue.Empty:
                return True
            if command is None:
                self._publish(engine, engine.abort_all())
                return False
            if (delta := command(engine)) is not None:
                self._publish(engine, [delta])

    def _audit(self, engine: Engine) -> None:
        """Of all pages, so not after every request of a client that sends one after the other."""
        now = time.monotonic()
        if now - self._audited_s >= AUDIT_PERIOD_S:
            self._audited_s = now
            engine.check_integrity()

    def _publish(
        self, engine: Engine, deltas: list[SequenceDelta], *, report: bool = False
    ) -> None:
        """report: in any case, not only when one is due"""
        now = time.monotonic()
        made: EngineNews | None = None
        if report or not engine.has_work or now - self._loads_made_s > LOADS_PERIOD_S:
            self._loads_made_s = now
            made = EngineNews.of(engine)
        self._post(self._listener.engine_output, deltas, made)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the event loop is closed
            logger.warning("the event loop ended before the engine")
