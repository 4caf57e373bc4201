"""A cluster in this process: router, one group's engine, an ingress. No Ray, no port for clients.

    calls ──► IngressService ── place ──► RouterService
                   │  ▲                        ▲
            submit ▼  │ deltas                 │ account
                 EngineService ────────────────┘
                   └── plans ──► the rank in this process, or ranks in children of it

These are the parts that `kvmesh serve` runs, so an answer here is the answer there. They talk over
the same connections, on the loopback interface and with both ends authenticated.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.engine_service import EngineService
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress.codec import ModelCodec
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.cluster.link import Address, Listener, listen
from kvmesh.cluster.make_ingress import limits_of, make_ingress
from kvmesh.cluster.messages import TO_ROUTER
from kvmesh.cluster.resources import check_layouts
from kvmesh.cluster.router_service import RouterService
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.telemetry.meters import EngineMeters, IngressMeters, RouterMeters
from kvmesh.cluster.telemetry.table import Metric
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.cache_directory import keep_compiled_loops
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import EngineError
from kvmesh.workers.executor import Executor
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.hub import pinned
from kvmesh.workers.model.source import Progress, resolve_model
from kvmesh.workers.threads import wait_passively

logger = logging.getLogger(__name__)

GROUP = "engine-0"
TENANT = "local"
# Callers bound what is in flight, and what waits here loses nothing by waiting.
QUEUE_LIMIT = 1 << 20
QUEUE_TIMEOUT_S = 30 * 24 * 3600.0
GUARD_PERIOD_S = 0.25
READY_POLL_S = 0.01
# Engines in a row that fail without an answer between them. A request that is to blame is found
# at its second failure, so more than this many have another cause.
MAX_RESTARTS = 3


class EngineFailedError(EngineError):
    """The engine has ended for good."""


MakeExecutor = Callable[[EngineConfig], Executor]


class LocalCluster:
    """All methods belong to one event loop.

    progress: called with the step of the start, and the share of it that is done if known
    make_executor: called in a thread
    ingress: serves the calls of the contract, for the tenant TENANT
    info: of the engine that was started last
    """

    ingress: IngressService
    info: EngineInfo

    def __init__(
        self,
        config: ClusterConfig,
        progress: Progress | None = None,
        make_executor: MakeExecutor | None = None,
    ) -> None:
        router = config.router.model_copy(update={"queue_timeout_s": QUEUE_TIMEOUT_S})
        self._config = config.model_copy(update={"router": router})
        self._progress = progress or (lambda step, share: None)
        self._make_executor = make_executor or _local_executor
        self._identity = Identity.make()
        self._codec: ModelCodec | None = None
        self._engine: EngineService | None = None
        self._listener: Listener | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._meters = _AnswerCount(_no_instrument)
        self._limits: set[asyncio.Timeout] = set()  # of the calls that run
        self._failed: Exception | None = None

    # Life

    async def start(self) -> None:
        """Load the model, and wait until requests can be served.

        Raises ConfigError, EngineError and what else keeps it from that; nothing then runs. It is
        cancelled without waiting for the model to load.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        use_local_defaults()
        model = await asyncio.to_thread(pinned, self._config.model)
        self._config = self._config.model_copy(update={"model": model})
        files = await asyncio.to_thread(resolve_model, self._config.model, progress=self._progress)
        check_layouts(self._config, read_facts(files.path))
        self._progress("loading the model", None)
        settings = RouterConfig(queue_limit=QUEUE_LIMIT)
        self._router = RouterService(settings, RouterMeters(_no_instrument), groups=[GROUP])
        self._listener = await listen("127.0.0.1", self._identity, TO_ROUTER, self._router.accept)
        self._tasks.append(asyncio.create_task(self._router.run()))
        loading = asyncio.create_task(self._start_engine())
        limits = replace(
            limits_of(self._config),
            max_waiting_prompts=QUEUE_LIMIT,
            max_waiting_chats=QUEUE_LIMIT,
            max_waiting_grammars=QUEUE_LIMIT,
        )
        try:
            self.ingress, self._codec = make_ingress(
                self._config, self._identity, self._find_router, self._meters, limits
            )
            self.ingress.start()
            await loading
        finally:
            loading.cancel()
        # First, as an engine may fail before the router knows that it is there.
        self._tasks.append(asyncio.create_task(self._guard()))
        await self._ready()

    async def _start_engine(self) -> None:
        """Load the model. Raises what keeps the engine from running."""
        config = self._config.engine_config()
        executor = await asyncio.to_thread(self._make_executor, config)
        service = EngineService(
            GROUP,
            config,
            executor,
            EngineMeters(_no_instrument, GROUP),
            self._identity,
            self._find_router,
        )
        try:
            self.info = await service.start()
        except BaseException:
            # Its thread may still load, and is left to that: it ends with the process.
            await asyncio.to_thread(executor.close)
            raise
        self._engine = service

    async def _ready(self) -> None:
        while not self.ingress.ready:
            self._check()
            await asyncio.sleep(READY_POLL_S)
            await self.ingress.refresh()

    async def stop(self) -> None:
        """End what runs. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._codec is not None:
            await self.ingress.stop()
            self._codec.close()
            self._codec = None
        if self._engine is not None:
            engine, self._engine = self._engine, None
            self._router.groups.expect(frozenset())
            await engine.stop()
        if self._listener is not None:
            self._listener.close()

    # Failures

    @contextlib.asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """A call to the ingress, in one task; EngineFailedError ends it when nothing else will."""
        self._check()
        try:
            async with asyncio.timeout(None) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            self._check()
            raise

    def _check(self) -> None:
        if self._failed is not None:
            raise EngineFailedError(f"the engine has failed: {self._failed}") from self._failed

    async def _guard(self) -> None:
        """Replace the engine when it has failed, as Serve does with a replica.

        Its requests then continue with the tokens that they have, and one that makes engines fail
        is found. If no engine can be started, or they fail for another reason, all fails.
        """
        in_vain = answered = 0
        while True:
            await asyncio.sleep(GUARD_PERIOD_S)
            assert self._engine is not None
            if self._engine.leader.failed is None:
                continue
            cause = _without_frames(self._engine.leader.failed)
            in_vain = in_vain + 1 if self._meters.answered == answered else 1
            answered = self._meters.answered
            try:
                if in_vain > MAX_RESTARTS:
                    raise EngineError(f"{in_vain} engines in a row have failed: {cause}")
                logger.error("the engine has failed, and is started again: %s", cause)
                await self._replace_engine()
            except Exception as error:
                logger.error("the engine has failed: %s", error)
                self._failed = error
                now = asyncio.get_running_loop().time()
                for limit in self._limits:
                    limit.reschedule(now)
                return

    async def _replace_engine(self) -> None:
        assert self._engine is not None
        await self._engine.stop()
        self._engine = None
        gc.collect()  # weights and pages, before others are allocated
        await self._start_engine()

    async def _find_router(self) -> Address:
        assert self._listener is not None
        return self._listener.address


def _without_frames(error: BaseException) -> str:
    """What an error says. Its frames, which hold the weights and pages of its engine, let go."""
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)
        at = at.__cause__ or at.__context__
    return str(error)


def use_local_defaults() -> None:
    """Have this process wait for CPU threads, and keep compiled loops, as a rank's process does.

    Libraries read this when they are loaded: it has no effect on those that are.
    """
    if "torch" not in sys.modules:
        wait_passively(os.environ)
    if "numba" not in sys.modules:
        keep_compiled_loops(os.environ)


def _local_executor(config: EngineConfig) -> Executor:
    from kvmesh.workers.local import local_executor

    return local_executor(config)


class _AnswerCount(IngressMeters):
    """answered: generations that have ended by themselves"""

    answered = 0

    def finished(self, usage: pb.Usage, tenant: str, longest_tokens: int) -> None:
        self.answered += 1


class _NoInstrument:
    def record(self, value: float, labels: Mapping[str, str]) -> None:
        """Nobody reads metrics here."""


def _no_instrument(metric: Metric) -> _NoInstrument:
    return _NoInstrument()
