"""The leader of a group: an asyncio interface to the engine's thread.

    submit, abort ──► commands ──► [engine thread: step, step, …] ──► deltas ──► deliver
                                       account of leases and pages ──► take_update

The engine runs in its own thread, so that neither a step nor the event loop waits for the
other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from kvmesh.workers.blame import Blame
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.engine_account import EngineAccount
from kvmesh.workers.engine_thread import EngineNews, EngineThread
from kvmesh.workers.errors import (
    EngineDrainingError,
    EngineError,
    InvalidFieldError,
    WorkerDiedError,
)
from kvmesh.workers.executor import Executor
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.lease_book import HeldLease
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.request import (
    NATURAL_ENDS,
    EndReason,
    EngineRequest,
    SequenceDelta,
)
from kvmesh.workers.request_check import check_request
from kvmesh.workers.scoring.gate import check_format

logger = logging.getLogger(__name__)

FAILED_TWICE = "engines failed repeatedly while they computed this request"

Deliver = Callable[[list[SequenceDelta]], None]


@dataclass(slots=True, eq=False)
class _LiveSequence:
    """tokens: that it has, prompt included"""

    deliver: Deliver
    tokens: int
    held: HeldLease | None


class EngineLeader:
    """Runs an Engine; all public methods belong to one event loop.

    on_change: called when the account has changed or there is a new report
    `failed` is set when the engine cannot continue: every live sequence has then ended as
    `Blame` says, and the group must be replaced.
    """

    def __init__(
        self, config: EngineConfig, executor: Executor, on_change: Callable[[], None] | None = None
    ) -> None:
        self._config = config
        self._executor = executor
        self._on_change = on_change or (lambda: None)
        self._thread = EngineThread(self._make_engine, self)
        self._engine: Engine | None = None
        self._account: EngineAccount | None = None
        self._live: dict[str, _LiveSequence] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.failed: Exception | None = None

    # Life

    async def start(self) -> EngineInfo:
        """Wait until all ranks are ready. Raises what kept them from it."""
        self._started: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._thread.start()
        return await self._started

    async def drain(self, timeout_s: float | None = None) -> None:
        """Take nothing new, and wait until everything taken has ended.

        timeout_s: after it, what still runs ends as CLEARED, so that it continues elsewhere
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            self.abort(list(self._live), EndReason.CLEARED)
            await self._idle.wait()

    async def stop(self) -> None:
        """End the engine's thread and let the ranks go. Idempotent."""
        self._draining = True
        await self._thread.stop()
        await asyncio.to_thread(self._executor.close)

    # Sequences

    def submit(self, requests: Sequence[EngineRequest], deliver: Deliver) -> None:
        """Accept all sequences of one lease, or one without a lease; deltas go to `deliver`.

        Raises InvalidFieldError, PoolCapacityError (never fits, or its lease exceeds what other
        leases leave), EngineDrainingError, WorkerDiedError; then none was accepted.
        """
        account = self.account
        if self._draining:
            raise EngineDrainingError("this group is shutting down")
        names: set[str] = set()
        for request in requests:
            name = request.request_id
            if name in self._live or name in names:
                raise InvalidFieldError("request_id", f"{name!r} is already running")
            names.add(name)
            check_request(request, account.info)
        held = None
        if (terms := requests[0].lease) is not None:
            account.book.check(terms)
            held = account.book.admit(terms, requests)
            self._on_change()
        for request in requests:
            tokens = len(request.prompt_token_ids)
            self._live[request.request_id] = _LiveSequence(deliver, tokens, held)
        self._idle.clear()
        account.loads_current = False
        self._thread.put(lambda engine: engine.add(*requests))

    def abort(self, request_ids: Iterable[str], reason: EndReason = EndReason.ABORT) -> None:
        """End sequences after the current step; those that are not live are skipped."""
        for request_id in request_ids:
            if request_id in self._live:
                self._thread.put(partial(_abort, request_id, reason))

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
        elif self._account is not None:
            self._account.book.withdraw(lease_id)
            self._on_change()

    def extend(self, terms: LeaseTerms) -> None:
        """A lease has grown.

        Not checked against other leases: the router grows leases by its own rules, and if this
        refused, the sequence would wait forever.
        """
        if self._account is not None and self._account.book.extend(terms):
            self._thread.put(lambda engine: engine.extend(terms))

    @property
    def step_age_s(self) -> float:
        """How long the current step has taken so far, 0 between two steps."""
        start_s = None if self._engine is None else self._engine.step_start_s
        return 0.0 if start_s is None else max(time.monotonic() - start_s, 0.0)

    @property
    def account(self) -> EngineAccount:
        """What it reports. Raises WorkerDiedError, EngineError before it has started."""
        if self.failed is not None:
            raise WorkerDiedError(f"the engine of this group has failed: {self.failed}")
        if self._account is None:
            raise EngineError("the engine has not started yet")
        return self._account

    # Within

    def _make_engine(self) -> Engine:
        """In the engine's thread, when all ranks are ready."""
        rank = self._executor.describe()[0]
        config = self._config.replace(kv_format=rank.kv_format or self._config.kv_format)
        check = check_format(config, rank.head_dim, self._executor.divergences, rank.values_in_keys)
        return Engine(self._config, self._executor, check=check)

    # What the engine's thread posts

    def engine_output(self, deltas: list[SequenceDelta], report: EngineNews | None = None) -> None:
        """Deliver each client's deltas.

        report: noted before clients see that a sequence has ended
        """
        account = self._account
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
                    assert account is not None
                    account.book.end(held, _natural_output(delta))
                changed = True
            elif delta.token_ids:  # others report scores or progress
                live.tokens += len(delta.token_ids)
                if held is not None and live.tokens >= held.next_note_tokens:
                    assert account is not None
                    account.book.note(held, live.tokens)
                    changed = True
            mine = by_client.get(live.deliver)
            if mine is None:
                by_client[live.deliver] = [delta]
            else:
                mine.append(delta)
        if account is not None:
            account.loads_current = account.loads_current and not changed
            if report is not None:
                account.note(report)
        for deliver, found in by_client.items():
            deliver(found)
        if changed or report is not None:
            self._on_change()
        if not self._live:
            self._idle.set()

    def engine_failed(self, error: Exception) -> None:
        """End all live sequences with this error, each as it may have caused it."""
        self.failed = error
        if not self._started.done():
            self._started.set_exception(error)
        self._on_change()
        blame = Blame() if self._engine is None else self._engine.blame
        ends = {name: blame.end_of(name, error) for name in self._live}
        self.engine_output(
            [
                SequenceDelta(name, (), finish_reason=end, error=_account_of(end, error))
                for name, end in ends.items()
            ]
        )

    def engine_started(self, engine: Engine) -> None:
        self._engine = engine
        self._account = EngineAccount(engine)
        if not self._started.done():
            self._started.set_result(engine.info)


def _account_of(end: EndReason, error: Exception) -> str:
    return FAILED_TWICE if end is EndReason.FAULT else str(error)


def _abort(request_id: str, reason: EndReason, engine: Engine) -> SequenceDelta | None:
    return engine.abort(request_id, reason)


def _natural_output(delta: SequenceDelta) -> int | None:
    """Output tokens of a sequence that ended by itself, else None."""
    natural = delta.finish_reason in NATURAL_ENDS and delta.usage is not None
    return delta.usage.completion_tokens if natural and delta.usage else None
