"""A cluster in one process: real ingress, router, engines and leaders; only Ray is not there.

The engines' executor keeps tokens for keys and values and takes a permit for
each step, so that a test decides what is in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt

from kvmesh.cluster.engine_service import EngineService
from kvmesh.cluster.ingress.authenticate import Authenticator, hash_key
from kvmesh.cluster.ingress.errors import EngineLostError
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.metrics import EngineMeters, IngressMeters, RouterMeters
from kvmesh.cluster.peers import EngineReport, StreamOpened
from kvmesh.cluster.router_service import RouterService
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.request import Growth, Placement, PlaceRequest
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.request import EngineRequest, LeaseTerms, PageChanges, SequenceDelta
from tests.workers.memory_executor import EOS, VOCAB, expected_output
from tests.workers.test_leader import CONFIG, MANY, GatedExecutor

FIRST = ord("A")
KEY = "the-key"
METADATA = (("authorization", f"Bearer {KEY}"),)


def text_of(tokens: Iterable[int]) -> str:
    """One character a token; none for the end of sequence."""
    return "".join(chr(FIRST + token) for token in tokens if token != EOS)


def answer(prompt: Sequence[int], max_tokens: int) -> list[int]:
    return expected_output(list(prompt), max_tokens, ignore_eos=True)


class LetterStream:
    def push(self, ids: Sequence[int]) -> str:
        return text_of(ids)

    def flush(self) -> str:
        return ""


class LetterCodec:
    """`peers.TextCodec` of a model whose tokens are characters."""

    has_chat_template = False
    eos_token_ids = (EOS,)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array([(ord(character) - FIRST) % VOCAB for character in text], dtype=np.int32)

    def encode_chat(self, turns: Iterable[tuple[str, str]]) -> npt.NDArray[np.int32]:
        raise ValueError("there is no template")

    def decode_token(self, token_id: int) -> str:
        return text_of([token_id])

    def stream(self) -> LetterStream:
        return LetterStream()


class NoMeters:
    def inc(self, value: float, tags: Mapping[str, str]) -> None: ...

    def set(self, value: float, tags: Mapping[str, str]) -> None: ...

    def observe(self, value: float, tags: Mapping[str, str]) -> None: ...

    def counter(self, name: str, description: str, tags: Sequence[str]) -> NoMeters:
        return self

    def gauge(self, name: str, description: str, tags: Sequence[str]) -> NoMeters:
        return self

    def histogram(
        self, name: str, description: str, tags: Sequence[str], buckets: Sequence[float]
    ) -> NoMeters:
        return self


class Line:
    """`peers.EngineClient` that can be cut, made to refuse, or held up on its way."""

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self._cut = asyncio.Event()
        self.refusals: list[Exception] = []
        self.submitted: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.extended: list[LeaseTerms] = []
        self.let_through = asyncio.Event()
        self.let_through.set()
        self.arrived = asyncio.Event()
        self.ahead = 0  # submissions that pass even when others are held

    def cut(self) -> None:
        """From now on nothing gets through; streams end as with a dead process."""
        self._cut.set()

    async def submit(self, request: EngineRequest, epoch: str) -> None:
        self._check()
        if self.ahead:
            self.ahead -= 1
        else:
            self.arrived.set()
            await self.let_through.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        self.submitted.append(request)
        await self._service.submit(request, epoch)

    async def abort(self, request_ids: Sequence[str]) -> int:
        self._check()
        self.aborted.extend(request_ids)
        return await self._service.abort(request_ids)

    async def outputs(
        self, client_id: str
    ) -> AsyncGenerator[StreamOpened | list[SequenceDelta], None]:
        self._check()
        stream = self._service.outputs(client_id)
        cut = asyncio.ensure_future(self._cut.wait())
        try:
            while True:
                message = asyncio.ensure_future(anext(stream))
                await asyncio.wait([message, cut], return_when=asyncio.FIRST_COMPLETED)
                if cut.done():
                    message.cancel()
                    await asyncio.gather(message, return_exceptions=True)
                    raise EngineLostError()
                yield await message
        finally:
            cut.cancel()
            await stream.aclose()

    async def extend(self, request_ids: Sequence[str], lease: LeaseTerms) -> None:
        self._check()
        self.extended.append(lease)
        await self._service.extend(request_ids, lease)

    async def report(self, pages_after: int = 0) -> tuple[EngineReport, PageChanges]:
        self._check()
        return await self._service.report(pages_after)

    def _check(self) -> None:
        if self._cut.is_set():
            raise EngineLostError()


class CountingRouter(RouterService):
    """Remembers what was granted, and how often it was given back."""

    def __init__(
        self,
        lines: Mapping[str, Line],
        config: RouterConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(lines, config, RouterMeters(NoMeters()), clock=clock)
        self.placed: list[PlaceRequest] = []
        self.granted: list[Placement] = []
        self.given_back: Counter[str] = Counter()
        self.told_begun: Counter[str] = Counter()
        self.learned: list[int | None] = []
        self.grown: Counter[str] = Counter()
        self.suspected: list[str] = []
        self.hold_release = asyncio.Event()
        self.hold_release.set()
        self.releasing = asyncio.Event()
        self.hold_grow = asyncio.Event()
        self.hold_grow.set()
        self.growing = asyncio.Event()

    async def place(
        self, request: PlaceRequest, *, ticket: str, supersede: bool = False
    ) -> Placement:
        self.placed.append(request)
        placement = await super().place(request, ticket=ticket, supersede=supersede)
        self.granted.append(placement)
        return placement

    async def release(self, lease_id: str, output_tokens: int | None = None) -> None:
        self.given_back[lease_id] += 1
        self.learned.append(output_tokens)
        self.releasing.set()
        await self.hold_release.wait()
        await super().release(lease_id, output_tokens)

    async def begun(self, lease_id: str) -> None:
        self.told_begun[lease_id] += 1
        await super().begun(lease_id)

    async def grow(self, lease_id: str, request: PlaceRequest, output_tokens: int) -> Growth | None:
        self.growing.set()
        await self.hold_grow.wait()
        growth = await super().grow(lease_id, request, output_tokens)
        self.grown[lease_id] += growth is not None
        return growth

    async def suspect(self, group: str, epoch: str) -> None:
        self.suspected.append(group)
        await super().suspect(group, epoch)


class Machine:
    """Everything of a cluster with `groups` engines, and one ingress."""

    def __init__(self, groups: int, config: RouterConfig) -> None:
        names = [f"g{index}" for index in range(groups)]
        self.executors = {name: GatedExecutor() for name in names}
        self.leaders = {name: EngineLeader(CONFIG, self.executors[name]) for name in names}
        self.services = {
            name: EngineService(self.leaders[name], EngineMeters(NoMeters(), name))
            for name in names
        }
        self.lines = {name: Line(self.services[name]) for name in names}
        self.router = CountingRouter(self.lines, config)
        self.ingress = IngressService(
            self.router,
            self.lines,
            LetterCodec(),
            Authenticator([(hash_key(KEY), "tenant")]),
            Limits(),
            IngressMeters(NoMeters()),
            name="ingress",
            version="0",
        )

    async def start(self) -> None:
        for service in self.services.values():
            await service.start()
        await self.router.refresh()
        await self.ingress.refresh()

    async def stop(self) -> None:
        self.allow(MANY)
        await self.ingress.stop()
        for service in self.services.values():
            await service.stop()

    def allow(self, steps: int) -> None:
        for executor in self.executors.values():
            executor.allow(steps)

    def stream(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateStreamResponse]:
        return self.ingress.generate_stream(request, METADATA)

    async def settled(self) -> None:
        """Wait until everything that outlives its request has ended too."""
        while self.ingress._kept:
            await asyncio.wait_for(asyncio.gather(*self.ingress._kept, return_exceptions=True), 20)

    async def at_rest(self) -> None:
        """Nothing is leased, nothing held, and every lease was given back exactly once."""
        await self.settled()
        await self.router.refresh()
        status = await self.router.status()
        assert status.live_requests == 0
        assert status.router.leases == status.router.queue_depth == 0
        for group in status.router.groups:
            assert (group.sequences, group.used_bytes) == (0, 0)
            assert group.hot_pages_used == group.sealed_pages_used == 0
        assert self.router.given_back == {p.lease.lease_id: 1 for p in self.router.granted}
        for leader in self.leaders.values():
            if leader.failed is None:
                loads = leader.loads()
                assert (loads.running, loads.waiting, loads.leases) == (0, 0, ())
                assert loads.pool.hot_used == loads.pool.sealed_used == 0


@asynccontextmanager
async def machine(groups: int = 1, config: RouterConfig | None = None) -> AsyncGenerator[Machine]:
    """Leaves a cluster at rest behind, or fails."""
    built = Machine(groups, config or RouterConfig())
    await built.start()
    try:
        yield built
        built.allow(MANY)
        await built.at_rest()
    finally:
        await built.stop()
