"""The calls of the wire contract, over a router and engines: everything but the transport."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping

import numpy as np

from kvmesh.cluster.ingress import validate, wire
from kvmesh.cluster.ingress.authenticate import Authenticator
from kvmesh.cluster.ingress.errors import (
    ContextExceededError,
    DrainingError,
    NotReadyError,
    ResumeMismatchError,
    UnknownModelError,
)
from kvmesh.cluster.ingress.estimate import estimate_reply, explain_reply, geometry_of
from kvmesh.cluster.ingress.generation import Generation, Surroundings
from kvmesh.cluster.ingress.links import EngineLink
from kvmesh.cluster.ingress.quality import groups_below
from kvmesh.cluster.metrics import IngressMeters
from kvmesh.cluster.peers import ClusterStatus, EngineClient, RouterClient, TextCodec
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.prefix_cache import PageDigests
from kvmesh.workers.request import EngineInfo, TokenIds

logger = logging.getLogger(__name__)

Metadata = Iterable[tuple[str, str | bytes]]

LONG_TEXT_CHARS = 4096  # tokenising longer texts would hold up everybody's streams
LONG_PROMPT_TOKENS = 1 << 16  # and so would hashing longer prompts
REFRESH_PERIOD_S = 1.0


class IngressService:
    """One ingress process.

    engines: by group
    model_names: by which requests may call the model, besides its engines' own name for it
    name: unique among ingress processes
    """

    def __init__(
        self,
        router: RouterClient,
        engines: Mapping[str, EngineClient],
        codec: TextCodec,
        authenticator: Authenticator,
        limits: validate.Limits,
        meters: IngressMeters,
        *,
        name: str,
        version: str,
        model_names: frozenset[str] = frozenset(),
        queue_timeout_s: float = 120.0,
    ) -> None:
        self._router = router
        self._codec = codec
        self._authenticator = authenticator
        self._limits = limits
        self._meters = meters
        self._version = version
        self._model_names = model_names
        self._links = {group: EngineLink(engine, name) for group, engine in engines.items()}
        self._status: ClusterStatus | None = None
        self._kept: set[asyncio.Task[None]] = set()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self._around = Surroundings(
            router=router,
            link=self._links.__getitem__,
            info=self._info,
            codec=codec,
            queue_timeout_s=queue_timeout_s,
            keep=self._keep,
        )

    # Life

    async def follow(self) -> None:
        """Keep what is known of the groups current; runs until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_PERIOD_S)

    async def refresh(self) -> None:
        try:
            self._status = await self._router.status()
            self.draining = self.draining or self._status.draining
        except NotReadyError:
            logger.warning("the router does not answer")

    @property
    def ready(self) -> bool:
        """Whether a request could be served."""
        return bool(self._status and self._status.healthy) and not self.draining

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and let what runs end, for so long at most."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def stop(self) -> None:
        """Close every stream, and see leases given back."""
        self.draining = True
        await asyncio.gather(*(link.close() for link in self._links.values()))
        if self._kept:
            await asyncio.wait(self._kept, timeout=5.0)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    # Calls

    async def generate_stream(
        self, request: object, metadata: Metadata
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """GenerateStream; raises the errors of the table."""
        tenant = self._admit(request, metadata)
        assert isinstance(request, pb.GenerateRequest)
        generation = await self._generation(request, tenant)
        self._running += 1
        self._idle.clear()
        try:
            async with contextlib.aclosing(generation.events()) as events:
                async for event in events:
                    if event.HasField("usage"):
                        self._measure(event.usage)
                    yield event
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def generate(self, request: object, metadata: Metadata) -> pb.GenerateResponse:
        """Generate: the stream's events, gathered."""
        self._authenticator.authenticate(metadata)  # before anything is said of the request
        if isinstance(request, pb.GenerateRequest) and request.HasField("resume"):
            validate.refuse("resume", "is for GenerateStream; a reply in one piece has no cursor")
        started, usage = pb.Started(), pb.Usage()
        choices: dict[int, pb.Choice] = {}
        async with contextlib.aclosing(self.generate_stream(request, metadata)) as events:
            async for event in events:
                match event.WhichOneof("event"):
                    case "started":
                        started = event.started
                    case "delta":
                        _gather_delta(choices, event.delta)
                    case "choice_finished":
                        _gather_finish(choices, event.choice_finished)
                    case "usage":
                        usage = event.usage
        return pb.GenerateResponse(
            request_id=started.request_id,
            model=started.model,
            seed=started.seed,
            choices=[choices[index] for index in sorted(choices)],
            usage=usage,
        )

    async def tokenize(self, request: object, metadata: Metadata) -> pb.TokenizeResponse:
        self._admit(request, metadata)
        assert isinstance(request, pb.TokenizeRequest)
        self._check_model(request.model)
        ids = await self._encode(validate.prompt(request.prompt))
        return pb.TokenizeResponse(
            token_ids=ids.tolist(), max_model_len=self._max_model_len(self._known())
        )

    async def abort(self, request: object, metadata: Metadata) -> pb.AbortResponse:
        """Abort, by a request id of the caller's own tenant."""
        tenant = self._admit(request, metadata)
        assert isinstance(request, pb.AbortRequest)
        if not request.request_id:
            validate.refuse("request_id", "must not be empty")
        aborted = await self._router.abort(f"{tenant}/{request.request_id}")
        return pb.AbortResponse(aborted=aborted)

    async def estimate_budget(
        self, request: object, metadata: Metadata
    ) -> pb.EstimateBudgetResponse:
        tenant = self._admit(request, metadata)
        assert isinstance(request, pb.EstimateBudgetRequest)
        self._check_model(request.model)
        status = self._known()
        prompt_tokens, hashes = await self._size(request, tenant)
        max_tokens = self._limits.default_max_tokens
        if request.HasField("max_tokens"):
            max_tokens = request.max_tokens
        for field, value in (("max_tokens", max_tokens), ("prompt_tokens", prompt_tokens)):
            if not 1 <= value < 1 << 40:
                validate.refuse(field, f"must be from 1 to 2^40, got {value}")
        n = request.n if request.HasField("n") else 1
        if not 1 <= n <= self._limits.max_choices:
            validate.refuse("n", f"must be from 1 to {self._limits.max_choices}, got {n}")
        asked = PlaceRequest(
            request_id="estimate",
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            tenant=tenant,
            priority=request.priority,
            page_hashes=hashes,
            excluded_groups=groups_below(request.min_kv_format, status),
            sequences=n,
        )
        return estimate_reply(asked, await self._router.estimate(asked), status)

    async def explain(self, request: object, metadata: Metadata) -> pb.ExplainResponse:
        """Explain, by a request id of the caller's own tenant."""
        tenant = self._admit(request, metadata)
        assert isinstance(request, pb.ExplainRequest)
        if not request.request_id:
            validate.refuse("request_id", "must not be empty")
        explained = await self._router.explain(f"{tenant}/{request.request_id}")
        return explain_reply(request.request_id, explained, self._known())

    async def get_model_info(self, request: object, metadata: Metadata) -> pb.GetModelInfoResponse:
        self._admit(request, metadata)
        return wire.model_info(self._known(), self._codec, self._version)

    async def get_loads(self, request: object, metadata: Metadata) -> pb.GetLoadsResponse:
        self._admit(request, metadata)
        return wire.loads(await self._router.status(fresh=True))

    # Within

    def _admit(self, request: object, metadata: Metadata) -> str:
        """The caller's tenant; refuses who is not known, then what cannot be read."""
        tenant = self._authenticator.authenticate(metadata)
        validate.check_message(request, self._limits)
        if self.draining:
            raise DrainingError()
        return tenant

    async def _generation(self, request: pb.GenerateRequest, tenant: str) -> Generation:
        self._check_model(request.model)
        spec = validate.generation_spec(request, self._limits)
        status = self._known()
        info = self._any_info(status)
        if spec.resume is not None:
            if not request.sampling_params.HasField("seed"):
                validate.refuse("sampling_params.seed", "must be the one that `started` reported")
            if spec.resume.model_revision != info.model_revision:
                raise ResumeMismatchError("the model is no longer the one that was resumed from")
        ids = await self._encode(spec.prompt)
        validate.check_tokens(spec, ids, info.vocab_size)
        longest = self._max_model_len(status)
        if len(ids) >= longest:
            raise self._context_exceeded(len(ids), status)
        params = validate.fit_context(spec, len(ids), longest)
        hashes = await _page_hashes(ids, validate.cache_salt(tenant, spec.cache_salt), info)
        excluded = groups_below(spec.min_kv_format, status)
        return Generation(spec, ids, params, tenant, self._around, hashes, excluded)

    async def _encode(self, prompt: validate.Prompt) -> TokenIds:
        """Token ids; a long text is tokenised beside the event loop."""
        if isinstance(prompt, np.ndarray):
            validate.check_prompt_ids(prompt, self._any_info(self._known()).vocab_size)
            return prompt
        if isinstance(prompt, str):
            if len(prompt) < LONG_TEXT_CHARS:
                return self._codec.encode(prompt)
            return await asyncio.to_thread(self._codec.encode, prompt)
        turns = [(turn.role, turn.content) for turn in prompt]
        if not self._codec.has_chat_template:
            validate.refuse("prompt.chat", "the model has no chat template; send text")
        try:
            if sum(len(content) for _, content in turns) < LONG_TEXT_CHARS:
                return self._codec.encode_chat(turns)
            return await asyncio.to_thread(self._codec.encode_chat, turns)
        except ValueError as error:
            validate.refuse("prompt.chat", str(error))

    async def _size(
        self, request: pb.EstimateBudgetRequest, tenant: str
    ) -> tuple[int, tuple[bytes, ...]]:
        """The prompt's length, and its pages' hashes where the prompt itself is given."""
        if request.WhichOneof("size") == "prompt_tokens":
            return request.prompt_tokens, ()
        ids = await self._encode(validate.prompt(request.prompt))
        info = self._any_info(self._known())
        return len(ids), await _page_hashes(ids, validate.cache_salt(tenant, ""), info)

    def _known(self) -> ClusterStatus:
        if self._status is None or not self._status.reports:
            raise NotReadyError()
        return self._status

    async def _info(self, group: str) -> EngineInfo:
        report = self._known().reports.get(group)
        if report is None:  # it came up since the last refresh
            await self.refresh()
            report = self._known().reports.get(group)
        if report is None:
            raise NotReadyError()
        return report.info

    def _any_info(self, status: ClusterStatus) -> EngineInfo:
        return next(iter(status.reports.values())).info

    def _max_model_len(self, status: ClusterStatus) -> int:
        return max(report.info.max_model_len for report in status.reports.values())

    def _check_model(self, asked: str) -> None:
        if not asked or asked in self._model_names:
            return
        served = self._any_info(self._known()).model
        if asked != served:
            raise UnknownModelError(asked, served)

    def _context_exceeded(self, prompt_tokens: int, status: ClusterStatus) -> ContextExceededError:
        """The bytes are of the group with the longest context."""
        info = max((r.info for r in status.reports.values()), key=lambda i: i.max_model_len)
        geometry = geometry_of(info)
        return ContextExceededError(
            prompt_tokens,
            info.max_model_len,
            geometry.bytes_of(geometry.peak_need(prompt_tokens + 1)),
            info.hot_pages * info.hot_page_bytes + info.sealed_pages * info.sealed_page_bytes,
        )

    def _measure(self, usage: pb.Usage) -> None:
        first_token_s = None
        if usage.HasField("time_to_first_token_s"):
            first_token_s = usage.time_to_first_token_s
        self._meters.finished(usage.group, first_token_s, usage.queue_s, usage.failovers)


async def _page_hashes(ids: TokenIds, salt: str, info: EngineInfo) -> tuple[bytes, ...]:
    """Of the prompt's full pages, as the prefix caches of engines like this one know them."""
    if not info.prefix_cache:
        return ()
    digests = PageDigests(info.page_size, salt)
    pages = len(ids) // info.page_size
    if len(ids) < LONG_PROMPT_TOKENS:
        return tuple(digests.upto(ids, pages))
    return tuple(await asyncio.to_thread(digests.upto, ids, pages))


def _gather_delta(choices: dict[int, pb.Choice], delta: pb.Delta) -> None:
    choice = choices.setdefault(delta.index, pb.Choice(index=delta.index))
    choice.text += delta.text
    choice.token_ids.extend(delta.token_ids)
    choice.logprobs.extend(delta.logprobs)


def _gather_finish(choices: dict[int, pb.Choice], finished: pb.ChoiceFinished) -> None:
    choice = choices.setdefault(finished.index, pb.Choice(index=finished.index))
    choice.finish_reason = finished.finish_reason
    match finished.WhichOneof("matched_stop"):
        case "matched_stop_string":
            choice.matched_stop_string = finished.matched_stop_string
        case "matched_stop_token_id":
            choice.matched_stop_token_id = finished.matched_stop_token_id
