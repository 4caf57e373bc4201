"""The calls of the wire contract, over a router and engines: everything but the transport.

Each takes a parsed request and the tenant that it is from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping

from kvmesh.cluster.errors import (
    DrainingError,
    ResumeMismatchError,
)
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress import admin_wire, served, validate, wire
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.engine_links import EngineLinks
from kvmesh.cluster.ingress.error_table import reason_label, to_wire
from kvmesh.cluster.ingress.estimate import estimate_reply, explain_reply
from kvmesh.cluster.ingress.generation import Generation, IngressContext
from kvmesh.cluster.ingress.prompts import Prompts
from kvmesh.cluster.ingress.quality import DIVERGENCE_NATS, refused_groups
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.router_link import RouterLink
from kvmesh.cluster.ingress.served import Served
from kvmesh.cluster.link import Address
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.cluster.telemetry.traces import OFF, RequestTrace, Traces
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.v1alpha import admin_pb2 as admin
from kvmesh.workers.model.generation_defaults import NEUTRAL, DefaultSampling
from kvmesh.workers.sampling_params import RANGES

logger = logging.getLogger(__name__)


class IngressService:
    """One ingress process.

    find_router: where the router listens; raises LinkError while it is not known
    model_names: other names for the model that requests may use
    defaults: of sampling parameters that a request does not set
    divergence_nats: measured divergence of KV formats
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
        divergence_nats: Mapping[str, float] = DIVERGENCE_NATS,
        traces: Traces = OFF,
    ) -> None:
        self._traces = traces
        self._router = RouterLink(identity, find_router)
        self._engines = EngineLinks(identity)
        self._codec = codec
        self._prompts = Prompts(codec)
        self._limits = limits
        self._defaults = defaults
        self._meters = meters
        self._version = version
        self._served = Served(self._router, model_names, self._measure)
        self._divergence_nats = divergence_nats
        self._tasks: list[asyncio.Task[None]] = []
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._context = IngressContext(self._router, self._engines, codec, queue_timeout_s, meters)

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
        """Refuse new requests, and wait up to `timeout_s` for running ones to end."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def stop(self) -> None:
        """Close every connection, which ends running requests."""
        self._draining = True
        self._engines.close()
        self._prompts.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._traces.close)

    # Calls

    async def generate_stream(
        self, request: pb.GenerateRequest, tenant: str
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """GenerateStream; raises the errors of ingress/error_table.py."""
        self._check_open()
        with self._traced(request, tenant) as trace:
            await self._context.waker.turn()  # many may arrive at once
            making = asyncio.ensure_future(self._generation(request, tenant, trace))
            del request  # it may be large, and the stream long
            try:
                while not (await asyncio.wait((making,), timeout=self._context.silence_s))[0]:
                    yield pb.GenerateStreamResponse()  # a long prompt takes its time
            finally:
                making.cancel()
            generation = making.result()
            with self._counted():
                async with contextlib.aclosing(generation.events()) as events:
                    async for event in events:
                        if event.HasField("usage"):
                            self._meters.finished(event.usage, tenant)
                        yield event

    async def generate(self, request: pb.GenerateRequest, tenant: str) -> pb.GenerateResponse:
        """Generate: a stream's events in one reply."""
        if request.HasField("resume"):
            refuse("resume", "must not be set for Generate; only GenerateStream can resume")
        params = pb.SamplingParams()
        params.CopyFrom(request.sampling_params)
        async with contextlib.aclosing(self.generate_stream(request, tenant)) as events:
            del request
            received = []
            async for event in events:
                if event.HasField("started"):
                    validate.check_reply(params, event.started.prompt_tokens)
                received.append(event)
            return wire.generated(received)

    async def tokenize(self, request: pb.TokenizeRequest, tenant: str) -> pb.TokenizeResponse:
        self._check_open()
        status = self._served.status_for(request.model)
        ids = await self._prompts.of(request.prompt, tenant, status)
        return pb.TokenizeResponse(
            token_ids=ids.tolist(), max_model_len=served.max_model_len(status)
        )

    async def detokenize(self, request: pb.DetokenizeRequest, tenant: str) -> pb.DetokenizeResponse:
        """The text of token ids, as a generation would have sent it."""
        self._check_open()
        status = self._served.status_for(request.model)
        return await self._prompts.decode(request, tenant, status)

    async def abort(self, request: pb.AbortRequest, tenant: str) -> pb.AbortResponse:
        """Abort, by a request id of the caller's own tenant."""
        self._check_open()
        if not request.request_id:
            refuse("request_id", "must not be empty")
        aborted = await self._router.abort(f"{tenant}/{request.request_id}")
        return pb.AbortResponse(aborted=aborted)

    async def estimate_budget(
        self, request: pb.EstimateBudgetRequest, tenant: str
    ) -> pb.EstimateBudgetResponse:
        self._check_open()
        status = self._served.status_for(request.model)
        prompt_tokens, hashes = await self._size(request, tenant)
        max_tokens = self._limits.default_max_tokens
        if request.HasField("max_tokens"):
            max_tokens = request.max_tokens
        for field, value in (("max_tokens", max_tokens), ("prompt_tokens", prompt_tokens)):
            RANGES[field].check(field, value)
        n = validate.number_of_choices("n", request, self._limits)
        place = PlaceRequest(
            request_id="estimate",
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            tenant=tenant,
            priority=request.priority,
            page_hashes=hashes,
            excluded_groups=refused_groups(request, status, self._divergence_nats),
            sequences=n,
        )
        return estimate_reply(place, await self._router.estimate(place), status)

    async def explain(self, request: pb.ExplainRequest, tenant: str) -> pb.ExplainResponse:
        """Explain, by a request id of the caller's own tenant."""
        self._check_open()
        if not request.request_id:
            refuse("request_id", "must not be empty")
        explained = await self._router.explain(f"{tenant}/{request.request_id}")
        return explain_reply(request.request_id, explained, self._served.status)

    async def get_model_info(
        self, request: pb.GetModelInfoRequest, tenant: str
    ) -> pb.GetModelInfoResponse:
        self._check_open()
        wire_defaults = pb.SamplingDefaults(
            max_tokens=self._limits.default_max_tokens, **self._defaults.given()
        )
        return wire.model_info(
            self._served.status, self._codec, self._version, self._divergence_nats, wire_defaults
        )

    async def get_tenant_loads(
        self, request: pb.GetTenantLoadsRequest, tenant: str
    ) -> pb.GetTenantLoadsResponse:
        return wire.tenant_loads(tenant, await self._router.tenant(tenant))

    # Calls of operators, who may make them while the cluster drains

    async def get_loads(
        self, request: admin.GetLoadsRequest, tenant: str
    ) -> admin.GetLoadsResponse:
        return admin_wire.loads(await self._served.fresh())

    async def list_groups(
        self, request: admin.ListGroupsRequest, tenant: str
    ) -> admin.ListGroupsResponse:
        return admin_wire.groups(self._served.status)

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
    def _counted(self) -> Iterator[None]:
        """A generation runs."""
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def _measure(self) -> None:
        self._meters.state(self._running, self._router.connected)

    def _check_open(self) -> None:
        if self._closed:
            raise DrainingError()

    async def _generation(
        self, request: pb.GenerateRequest, tenant: str, trace: RequestTrace
    ) -> Generation:
        status = self._served.status_for(request.model)
        self._prompts.check_length(request.prompt, status)
        spec = validate.generation_spec(request, self._limits, self._defaults)
        info = served.any_info(status)
        if spec.resume is not None:
            if not request.sampling_params.HasField("seed"):
                refuse("sampling_params.seed", "must be set to the seed that `started` reported")
            if spec.resume.model_revision != info.model_revision:
                raise ResumeMismatchError(
                    f"the stream started on model revision {spec.resume.model_revision!r}, but "
                    f"the cluster now serves {info.model_revision!r}"
                )
        ids = await self._prompts.encode(spec.prompt, tenant, status)
        validate.check_tokens(spec, ids, info.vocab_size, self._codec.unused_token_ids)
        longest = served.max_model_len(status)
        if len(ids) >= longest:
            raise served.context_exceeded(len(ids), status)
        params = validate.fit_context(spec, len(ids), longest)
        hashes: tuple[bytes, ...] = ()
        if params.prompt_logprobs is None:  # otherwise nothing cached would be used
            hashes = await self._prompts.page_hashes(ids, tenant, spec.cache_salt, info)
        excluded = refused_groups(request, status, self._divergence_nats)
        return Generation(spec, ids, params, tenant, self._context, hashes, excluded, trace)

    async def _size(
        self, request: pb.EstimateBudgetRequest, tenant: str
    ) -> tuple[int, tuple[bytes, ...]]:
        """The prompt's length, and its pages' hashes if the prompt itself is given."""
        if request.WhichOneof("size") == "prompt_tokens":
            return request.prompt_tokens, ()
        status = self._served.status
        ids = await self._prompts.of(request.prompt, tenant, status)
        info = served.any_info(status)
        return len(ids), await self._prompts.page_hashes(ids, tenant, "", info)
