"""Generations of the wire contract, over a router and engines: everything but the transport.

Each takes a parsed request and the tenant that it is from. Calls that generate nothing are in
questions.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

from kvmesh.cluster.errors import DrainingError
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress import validate
from kvmesh.cluster.ingress.answers.planner import AnswerPlanner
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.engine_links import EngineLinks
from kvmesh.cluster.ingress.error_table import reason_label, to_wire
from kvmesh.cluster.ingress.generation import Generation, IngressContext
from kvmesh.cluster.ingress.model_checks import check_reply
from kvmesh.cluster.ingress.prepare import Preparation
from kvmesh.cluster.ingress.prompts import Prompts
from kvmesh.cluster.ingress.questions import Questions
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.router_link import RouterLink
from kvmesh.cluster.ingress.served import Served
from kvmesh.cluster.ingress.whole_reply import WholeReply
from kvmesh.cluster.link import Address
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.cluster.telemetry.traces import OFF, RequestTrace, Traces
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.model.generation_defaults import NEUTRAL, DefaultSampling

logger = logging.getLogger(__name__)


class IngressService:
    """One ingress process.

    find_router: where the router listens; raises LinkError while it is not known
    model_names: other names for the model that requests may use
    defaults: of sampling parameters that a request does not set
    layout_reason: why the groups have their layout, "" if it was given
    questions: the calls that generate nothing
    """

    def __init__(
        self,
        identity: Identity,
        find_router: Callable[[], Awaitable[Address]],
        codec: TextCodec,
        limits: validate.Limits,
        meters: IngressMeters,
        *,
        version: str,
        model_names: frozenset[str] = frozenset(),
        queue_timeout_s: float = 120.0,
        defaults: DefaultSampling = NEUTRAL,
        layout_reason: str = "",
        traces: Traces = OFF,
    ) -> None:
        self._traces = traces
        self._router = RouterLink(identity, find_router)
        self._engines = EngineLinks(identity)
        self._prompts = Prompts(codec, limits)
        self._planner = AnswerPlanner(codec, limits.max_waiting_grammars)
        self._meters = meters
        self._served = Served(self._router, model_names, self._measure)
        self._preparation = Preparation(
            self._served,
            self._prompts,
            self._planner,
            codec,
            limits,
            defaults=defaults,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._open_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._context = IngressContext(self._router, self._engines, codec, queue_timeout_s, meters)
        self.questions = Questions(
            self._served,
            self._router,
            self._prompts,
            codec,
            limits,
            self._call,
            version=version,
            defaults=defaults,
            layout_reason=layout_reason,
        )

    # Start and stop

    def start(self) -> None:
        """Connect to the router, and keep its status up to date."""
        self._tasks = [
            asyncio.create_task(self._router.run()),
            asyncio.create_task(self._served.run()),
        ]

    def check_health(self) -> None:
        """Raises RuntimeError if this process no longer polls the router."""
        if any(task.done() for task in self._tasks):
            raise RuntimeError("the ingress no longer polls the router: a task has ended")

    @property
    def ready(self) -> bool:
        """Whether requests can be served."""
        return self._served.healthy and not self._closed

    async def refresh(self) -> None:
        """Ask the router for its status."""
        await self._served.refresh()

    @property
    def _closed(self) -> bool:
        return self._draining or self._served.draining

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls, and wait up to `timeout_s` for open ones to end."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def stop(self) -> None:
        """Close every connection, which ends running requests."""
        self._draining = True
        self._engines.close()
        self._prompts.close()
        self._planner.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._traces.close)

    # Calls

    async def generate_stream(
        self, request: pb.GenerateRequest, tenant: str
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """GenerateStream; raises the errors of ingress/error_table.py."""
        with self._call(), self._traced(request, tenant) as trace:
            await self._context.waker.turn()  # many may arrive at once
            preparing = asyncio.ensure_future(self._preparation.prepare(request, tenant))
            del request  # it may be large, and the stream long
            try:
                while not (await asyncio.wait((preparing,), timeout=self._context.silence_s))[0]:
                    yield pb.GenerateStreamResponse()  # a long prompt takes its time
            finally:
                preparing.cancel()
            generation = Generation(preparing.result(), self._context, trace)
            async with contextlib.aclosing(generation.events()) as events:
                async for event in events:
                    if event.HasField("usage"):
                        self._meters.finished(event.usage, tenant, generation.longest_tokens)
                    yield event

    async def generate(self, request: pb.GenerateRequest, tenant: str) -> pb.GenerateResponse:
        """Generate: a stream's events in one reply."""
        if request.HasField("resume"):
            refuse("resume", "must not be set for Generate; only GenerateStream can resume")
        params = pb.SamplingParams()
        params.CopyFrom(request.sampling_params)
        async with contextlib.aclosing(self.generate_stream(request, tenant)) as events:
            del request
            whole = WholeReply()
            async for event in events:
                if event.HasField("started"):
                    check_reply(params, event.started.prompt_tokens)
                whole.add(event)
            return whole.reply()

    # Internals

    @contextlib.contextmanager
    def _traced(self, request: pb.GenerateRequest, tenant: str) -> Iterator[RequestTrace]:
        """A generation's trace, which is over at the end of the block."""
        trace = self._traces.begin(request, tenant)
        del request
        try:
            trace.phase("tokenize")
            yield trace
        except Exception as error:
            trace.fail(reason_label(to_wire(error)))
            raise
        finally:
            trace.fail("cancelled")

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """A call is open. Raises DrainingError while this ingress or the cluster drains."""
        if self._closed:
            raise DrainingError()
        self._open_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open_calls -= 1
            if not self._open_calls:
                self._idle.set()

    def _measure(self) -> None:
        self._meters.state(self._open_calls, self._router.connected)
