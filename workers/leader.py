"""The leader of a group: an asyncio interface to the engine's thread.

    submit, abort ──► commands ──► [engine thread: step, step, …] ──► deltas ──► deliver
                                       account of leases and pages ──► take_update

The engine runs in its own thread, so that neither a step nor the event loop waits for the
other.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.errors import (
    EngineDrainingError,
    EngineError,
    InvalidFieldError,
    WorkerDiedError,
)
from kvmesh.workers.executor import Executor
from kvmesh.workers.lease import AccountUpdate, LeaseTerms, PageChanges
from kvmesh.workers.lease_book import HeldLease, LeaseBook
from kvmesh.workers.loads import EngineInfo, EngineLoads
from kvmesh.workers.request import (
    NATURAL_ENDS,
    EndReason,
    EngineRequest,
    SequenceDelta,
)
from kvmesh.workers.scoring.gate import check_format

logger = logging.getLogger(__name__)

Command = Callable[[Engine], SequenceDelta | None]
Deliver = Callable[[list[SequenceDelta]], None]
# The engine's load, and the cached blocks that were added or dropped since the last report.
Report = tuple[EngineLoads, Mapping[bytes, bool]]

# While sequences run, a report is made at most this often.
_LOADS_PERIOD_S = 0.05


@dataclass(slots=True, eq=False)
class _LiveSequence:
    """tokens: that it has, prompt included"""

    deliver: Deliver
    tokens: int
    held: HeldLease | None


class EngineLeader:
    """Runs an Engine; all public methods belong to one event loop.

    on_change: called when the account has changed or there is a new report
    `failed` is set when the engine cannot continue: every live sequence has then ended with
    EndReason.ERROR, and the group must be replaced.
    """

    def __init__(
        self, config: EngineConfig, executor: Executor, on_change: Callable[[], None] | None = None
    ) -> None:
        self._config = config
        self._executor = executor
        self._on_change = on_change or (lambda: None)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvmesh-engine", daemon=True)
        self._engine: Engine | None = None
        self._book: LeaseBook | None = None
        self._live: dict[str, _LiveSequence] = {}
        self._loads = EngineLoads()
        self._loads_current = False
        self._loads_made_s = 0.0  # on the engine's thread
        self._pages: dict[bytes, bool] = {}  # changed blocks, and whether they are held now
        self._held_pages: dict[bytes, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.failed: Exception | None = None

    # Life

    async def start(self) -> EngineInfo:
        """Wait until all ranks are ready. Raises what kept them from it."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._thread.start()
        return await self._started

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

    # Sequences

    def submit(self, requests: Sequence[EngineRequest], deliver: Deliver) -> None:
        """Accept all sequences of one lease, or one without a lease; deltas go to `deliver`.

        Raises InvalidFieldError, CapacityError (never fits, or its lease exceeds what other
        leases leave), EngineDrainingError, WorkerDiedError; then none was accepted.
        """
        engine, book = self._ready()
        if self._draining:
            raise EngineDrainingError("this group is shutting down")
        for request in requests:
            if request.request_id in self._live:
                raise InvalidFieldError("request_id", f"{request.request_id!r} is already running")
            engine.check(request)
        held = None
        if (terms := requests[0].lease) is not None:
            book.check(terms)
            held = book.admit(terms, requests)
            self._on_change()
        for request in requests:
            tokens = len(request.prompt_token_ids)
            self._live[request.request_id] = _LiveSequence(deliver, tokens, held)
        self._idle.clear()
        self._loads_current = False
        self._commands.put(lambda engine: engine.add_all(requests))

    def abort(self, request_ids: Iterable[str], reason: EndReason = EndReason.ABORT) -> None:
        """End sequences after the current step; those that are not live are skipped."""
        for request_id in request_ids:
            if request_id in self._live:
                self._commands.put(partial(_abort, request_id, reason))

    def disconnect(self, deliver: Deliver) -> None:
        """End all sequences that deliver to `deliver`."""
        self.abort([name for name, live in self._live.items() if live.deliver == deliver])

    def withdraw(self, lease_id: str) -> None:
        """End all sequences of a lease; it is reported as ended even if it has none."""
        names = [
            name
            for name, live in self._live.items()
            if live.held is not None and live.held.terms.lease_id == lease_id
        ]
        if names:
            self.abort(names)
        elif self._book is not None:
            self._book.withdraw(lease_id)
            self._on_change()

    def extend(self, terms: LeaseTerms) -> None:
        """A lease has grown.

        Not checked against other leases: the router grows leases by its own rules, and if this
        refused, the sequence would wait forever.
        """
        if self._book is not None and self._book.extend(terms):
            self._commands.put(lambda engine: engine.extend(terms))

    # The account

    def info(self) -> EngineInfo:
        return self._ready()[0].info

    def loads(self) -> EngineLoads:
        """The latest report: at most a step old, exact when idle."""
        self._ready()
        return self._loads

    @property
    def loads_current(self) -> bool:
        """Whether no sequence has started or ended since the latest report."""
        return self._loads_current

    def take_update(self) -> AccountUpdate:
        """Changes of leases since the last call."""
        return self._ready()[1].take_update()

    def take_page_changes(self) -> PageChanges:
        """Blocks that the prefix cache has added and dropped since the last call."""
        changes, self._pages = self._pages, {}
        return PageChanges(
            tuple(page for page, held in changes.items() if held),
            tuple(page for page, held in changes.items() if not held),
        )

    def restate(self) -> tuple[tuple[LeaseTerms, ...], AccountUpdate, PageChanges]:
        """All leases, their open wants, and all cached blocks: for a new router."""
        book = self._ready()[1]
        self._pages = {}
        return book.leases, book.restate(), PageChanges(held=tuple(self._held_pages))

    # Within

    def _ready(self) -> tuple[Engine, LeaseBook]:
        if self.failed is not None:
            raise WorkerDiedError(f"the engine of this group has failed: {self.failed}")
        if self._engine is None or self._book is None:
            raise EngineError("the engine has not started yet")
        return self._engine, self._book

    def _deliver(self, deltas: list[SequenceDelta], report: Report | None = None) -> None:
        """On the event loop: deliver each client's deltas.

        report: made after the deltas; noted before clients see that a sequence has ended
        """
        by_client: dict[Deliver, list[SequenceDelta]] = {}
        changed = False
        for delta in deltas:
            live = self._live.get(delta.request_id)
            if live is None:
                continue
            held = live.held
            if delta.finish_reason is not None:
                del self._live[delta.request_id]
                if held is not None:
                    self._end(held, delta)
                changed = True
            else:
                live.tokens += len(delta.token_ids)
                if held is not None and live.tokens >= held.next_note_tokens:
                    assert self._book is not None
                    self._book.note(held, live.tokens)
                    changed = True
            mine = by_client.get(live.deliver)
            if mine is None:
                by_client[live.deliver] = [delta]
            else:
                mine.append(delta)
        if changed:
            self._loads_current = False
        if report is not None:
            self._note_report(report)
        for deliver, found in by_client.items():
            deliver(found)
        if changed or report is not None:
            self._on_change()
        if not self._live:
            self._idle.set()

    def _end(self, held: HeldLease, delta: SequenceDelta) -> None:
        assert self._book is not None
        natural = delta.finish_reason in NATURAL_ENDS and delta.usage is not None
        self._book.end(held, delta.usage.completion_tokens if natural and delta.usage else None)

    def _note_report(self, report: Report) -> None:
        assert self._book is not None
        loads, pages = report
        self._loads = replace(loads, leases=self._book.leases)
        self._loads_current = True
        for page, held in pages.items():
            self._pages.pop(page, None)
            self._pages[page] = held
            if held:
                self._held_pages[page] = None
            else:
                self._held_pages.pop(page, None)

    def _fail(self, error: Exception) -> None:
        """On the event loop: end all live sequences."""
        self.failed = error
        if not self._started.done():
            self._started.set_exception(error)
        self._on_change()
        self._deliver(
            [
                SequenceDelta(request_id, (), finish_reason=EndReason.ERROR, error=str(error))
                for request_id in self._live
            ]
        )

    def _on_started(self, engine: Engine) -> None:
        self._engine = engine
        self._book = LeaseBook(engine.geometry, engine.info.capacity)
        if not self._started.done():
            self._started.set_result(engine.info)

    # The engine's thread

    def _run(self) -> None:
        try:
            head_dim = self._executor.describe()[0].head_dim
            check_format(self._config, head_dim, self._executor.divergences)
            engine = Engine(self._config, self._executor)
            self._post(self._on_started, engine)
            self._publish(engine, [])
            while self._obey(engine):
                if deltas := engine.step():
                    self._publish(engine, deltas)
        except Exception as error:
            logger.exception("the engine failed")
            self._post(self._fail, error)

    def _obey(self, engine: Engine) -> bool:
        """Run the queued commands; if there is nothing to compute, wait for one.

        Returns False to end the thread.
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
                self._publish(engine, [], report=True)
            try:
                command = self._commands.get(timeout=patience_s)
            except queue.Empty:
                return True
            if command is None:
                self._publish(engine, engine.abort_all())
                return False
            if (delta := command(engine)) is not None:
                self._publish(engine, [delta])

    def _publish(
        self, engine: Engine, deltas: list[SequenceDelta], *, report: bool = False
    ) -> None:
        """report: in any case, not only when one is due"""
        now = time.monotonic()
        if report or not engine.has_work or now - self._loads_made_s > _LOADS_PERIOD_S:
            self._loads_made_s = now
            self._post(self._deliver, deltas, (engine.loads(), engine.take_page_changes()))
        else:
            self._post(self._deliver, deltas)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the event loop is closed
            logger.warning("the event loop ended before the engine")


def _abort(request_id: str, reason: EndReason, engine: Engine) -> SequenceDelta | None:
    return engine.abort(request_id, reason)
