"""A cluster in one process: real ingress, router, engines, leaders and connections between
them; only Ray is missing.

The engines' executor stores tokens as keys and values and needs a permit for
each step, so that a test controls what is in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from unittest import mock

import numpy as np
import numpy.typing as npt

from kvmesh.cluster import link
from kvmesh.cluster.engine_service import EngineService, _Ingress
from kvmesh.cluster.errors import Failure
from kvmesh.cluster.group_connections import GroupConnections
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress.answers.model_form import ModelForm
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.link import (
    MAX_SILENT_BEATS,
    Address,
    Link,
    LinkError,
    Listener,
    connect,
    listen,
)
from kvmesh.cluster.messages import (
    TO_INGRESS_FROM_ENGINE,
    TO_INGRESS_FROM_ROUTER,
    TO_ROUTER,
    AccountNews,
    NewSequence,
    Place,
    Placed,
    Submit,
    Waiting,
)
from kvmesh.cluster.router_service import RouterPeer, RouterService
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.outcome import Granted, Grown, Outcome, Placement
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.telemetry.meters import EngineMeters, IngressMeters, RouterMeters
from kvmesh.cluster.telemetry.table import Kind, Metric
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers import engine_thread
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.model.chat import Conversation, PromptPiece
from kvmesh.workers.request import EndReason, TokenIds
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageNeed
from tests.workers.memory_executor import EOS, VOCAB, expected_output
from tests.workers.test_leader import CONFIG, MANY, GatedExecutor

IDENTITY = Identity.make()
FIRST = ord("A")
KEY = "the-key"
TENANT = "tenant"
PATIENCE_S = 120.0  # with what must happen, however busy the machine is


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
    """`TextCodec` of a model whose tokens are characters."""

    chat_template_names: tuple[str, ...] = ()
    max_token_chars = 1
    eos_token_ids = (EOS,)
    form = ModelForm.of(None, {})
    unused_token_ids: frozenset[int] = frozenset()
    placeholder_tokens: Mapping[int, str] = MappingProxyType({})

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array([(ord(character) - FIRST) % VOCAB for character in text], dtype=np.int32)

    def render_chat(self, chat: Conversation) -> list[PromptPiece]:
        raise InvalidFieldError("messages", "there is no chat template")

    def encode_pieces(self, pieces: Sequence[PromptPiece]) -> npt.NDArray[np.int32]:
        return self.encode("".join(piece.text for piece in pieces))

    def token_bytes(self, token_id: int) -> bytes:
        return text_of([token_id]).encode()

    def special_text(self, token_id: int) -> str:
        return ""

    def stream(self, prompt: Sequence[int] | TokenIds, skip_special_tokens: bool) -> LetterStream:
        return LetterStream()

    def raw_text(self, ids: Sequence[int]) -> str:
        return text_of(ids)


class SeenMeters:
    """Meters that keep what was recorded, by metric and labels in the table's order.

    Counters add up, gauges keep the latest value, histograms count.
    """

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[str, ...], float]] = {}

    def __call__(self, metric: Metric) -> _SeenMeter:
        return _SeenMeter(metric, self.values.setdefault(metric.name, {}))

    def of(self, metric: Metric, *labels: str) -> float | None:
        """labels: in the table's order; None if nothing was recorded"""
        return self.values.get(metric.name, {}).get(labels)


class _SeenMeter:
    def __init__(self, metric: Metric, values: dict[tuple[str, ...], float]) -> None:
        self._metric = metric
        self._values = values

    def record(self, value: float, labels: Mapping[str, str]) -> None:
        assert sorted(labels) == sorted(self._metric.label_names), self._metric.name
        key = tuple(labels[name] for name in self._metric.label_names)
        match self._metric.kind:
            case Kind.COUNTER:
                assert value > 0, f"{self._metric.name}: Ray refuses {value}"
                self._values[key] = self._values.get(key, 0.0) + value
            case Kind.GAUGE:
                self._values[key] = value
            case Kind.HISTOGRAM:
                assert value >= 0
                self._values[key] = self._values.get(key, 0.0) + 1


class WatchedEngine(EngineService):
    """An engine that can be cut off, or made to refuse or to delay the ingresses' messages."""

    def __init__(
        self,
        name: str,
        executor: GatedExecutor,
        find_router: Callable[[], Awaitable[Address]],
    ) -> None:
        self.meters = SeenMeters()
        super().__init__(
            name, CONFIG, executor, EngineMeters(self.meters, name), IDENTITY, find_router
        )
        self.refusals: list[Exception] = []
        self.submitted: list[Submit] = []
        self.ended: list[str] = []
        self.extended: list[LeaseTerms] = []
        self.arrived = asyncio.Event()
        self._held: list[Callable[[], None]] | None = None
        self._connections: list[_Ingress] = []
        extend = self.leader.extend

        def watch(terms: LeaseTerms) -> None:
            self.extended.append(terms)
            extend(terms)

        self.leader.extend = watch  # type: ignore[method-assign]

    @property
    def sequences(self) -> list[str]:
        """Ids of all sequences that were submitted."""
        return [sequence.request_id for x in self.submitted for sequence in x.sequences]

    def hold(self) -> None:
        """Delay the ingresses' messages until `deliver_held`, in order."""
        self._held = []

    def deliver_held(self) -> None:
        held, self._held = self._held or [], None
        for act in held:
            act()

    def cut(self) -> None:
        """Close every connection for good, as if the process had died."""
        assert self._listener is not None
        self._listener.close()
        self._account.leave()
        for ingress in self._connections:
            ingress._connection.abort()

    def submit(self, message: Submit, ingress: _Ingress) -> None:
        self.arrived.set()
        if ingress not in self._connections:
            self._connections.append(ingress)
        if self._held is not None:
            self._held.append(lambda: self.submit(message, ingress))
        elif self.refusals:
            ingress.reject(message.lease.lease_id, Failure.of(self.refusals.pop(0)))  # type: ignore[arg-type]
        else:
            self.submitted.append(message)
            super().submit(message, ingress)

    def end(self, request_ids: list[str], reason: EndReason) -> None:
        if self._held is not None:
            self._held.append(lambda: self.end(request_ids, reason))
        else:
            self.ended.extend(request_ids)
            super().end(request_ids, reason)


class WatchedGroups(GroupConnections):
    """Tells the router that watches what it is sent of engines."""

    watcher: WatchedRouter

    def account(self, name: str, message: AccountNews) -> None:
        self.watcher.note_account(message)
        super().account(name, message)

    def down(self, connection: Link) -> None:
        self.watcher.note_down(self.name_of(connection))
        super().down(connection)


class WatchedRouter(RouterService):
    """Records what was granted and how often each lease has ended; can withhold growth."""

    def __init__(
        self,
        config: RouterConfig,
        groups: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.meters = SeenMeters()
        meters = RouterMeters(self.meters, [TENANT])
        super().__init__(config, meters, groups=list(groups), clock=clock)
        self.groups.__class__ = WatchedGroups
        self.groups.watcher = self  # type: ignore[attr-defined]
        self.placed: list[PlaceRequest] = []
        self.granted: list[Placement] = []
        self.lease_ends: Counter[str] = Counter()
        self.first_tokens: Counter[str] = Counter()
        self.learned: list[int | None] = []
        self.wanted: Counter[str] = Counter()
        self.grown: Counter[str] = Counter()
        self.voided: set[str] = set()
        self._withheld: list[Outcome] | None = None
        self._listener: Listener | None = None
        self._connections: list[Link] = []

    async def listen(self) -> None:
        self._listener = await listen("127.0.0.1", IDENTITY, TO_ROUTER, self.accept)

    async def find(self) -> Address:
        if self._listener is None:
            raise LinkError("the router is down")
        return self._listener.address

    def die(self) -> None:
        """Close every connection for good, as if the process had been killed. Idempotent."""
        if self._listener is not None:
            self._listener.close()
        self._listener = None
        for connection in self._connections:
            connection.abort()

    def accept(self, connection: Link) -> RouterPeer:
        self._connections.append(connection)
        return super().accept(connection)

    def withhold_growth(self) -> None:
        self._withheld = []

    def resume_growth(self) -> None:
        withheld, self._withheld = self._withheld or [], None
        self.settle(withheld)

    def place(self, message: Place, peer: RouterPeer) -> None:
        self.placed.append(message.request)
        super().place(message, peer)

    def release(self, lease_id: str) -> None:
        self.lease_ends[lease_id] += self._holds(lease_id)
        super().release(lease_id)

    def _holds(self, lease_id: str) -> bool:
        return lease_id in self.router.leases

    def note_account(self, message: AccountNews) -> None:
        self.first_tokens.update(message.update.first_tokens)
        self.wanted.update(want.lease_id for want in message.update.wants)
        for end in message.update.ended:
            self.lease_ends[end.lease_id] += self._holds(end.lease_id)
            self.learned.append(end.output_tokens)

    def note_down(self, name: str) -> None:
        self.voided |= {x.lease.lease_id for x in self.granted if x.group == name}

    def settle(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case Granted(placement=placement):
                    self.granted.append(placement)
                case Grown(lease=lease):
                    if self._withheld is not None:
                        self._withheld.append(outcome)
                        continue
                    self.grown[lease.lease_id] += 1
            super().settle([outcome])


class Machine:
    """A cluster with `groups` engines, a router and one ingress.

    clock: of the router and of the requests
    """

    def __init__(
        self, groups: int, config: RouterConfig, budget: int, clock: Callable[[], float]
    ) -> None:
        names = [f"g{index}" for index in range(groups)]
        self._clock = clock
        self.router = WatchedRouter(config, names, clock)
        self.executors = {name: GatedExecutor(budget) for name in names}
        self.engines = {
            name: WatchedEngine(name, executor, self.find_router)
            for name, executor in self.executors.items()
        }
        self.replaced: list[WatchedEngine] = []
        self.meters = SeenMeters()  # the ingress's
        self.ingress = IngressService(
            IDENTITY,
            self.find_router,
            LetterCodec(),
            Limits(),
            IngressMeters(self.meters, [TENANT]),
            version="0",
        )
        self.ingress._context = replace(self.ingress._context, clock=clock)

    @property
    def leaders(self) -> dict[str, EngineLeader]:
        return {name: engine.leader for name, engine in self.engines.items()}

    async def find_router(self) -> Address:
        return await self.router.find()

    async def start(self) -> None:
        await self.router.listen()
        for engine in self.engines.values():
            await engine.start()
        self.ingress.start()
        await self.until(lambda: len(self.router.groups.names) == len(self.engines))
        await self.ingress.refresh()

    async def stop(self) -> None:
        self.allow(MANY)
        await self.ingress.stop()
        for engine in (*self.engines.values(), *self.replaced):
            await engine.stop()
        self.router.die()

    async def new_router(self, config: RouterConfig | None = None) -> WatchedRouter:
        """Kill the router, and replace it with a new one."""
        self.router.die()
        self.router = WatchedRouter(config or self.router.router.config, self.engines, self._clock)
        await self.router.listen()
        await self.until(lambda: len(self.router.groups.names) == len(self.engines))
        return self.router

    async def replace_engine(self, name: str) -> None:
        """Start a new engine for a group whose engine was cut off."""
        self.replaced.append(self.engines[name])
        self.executors[name].allow(MANY)
        self.executors[name] = GatedExecutor()
        self.engines[name] = WatchedEngine(name, self.executors[name], self.find_router)
        await self.engines[name].start()
        await self.until(lambda: name in self.router.groups.names)

    def hang(self, name: str) -> None:
        """Make an engine's peers find it silent. It then continues, as after a SIGCONT."""
        epoch = self.engines[name].leader.account.info.epoch
        to_engine = self.ingress._engines._links[epoch]._connection
        for connection in (self.router.groups[name].connection, to_engine):
            assert connection is not None
            for _ in range(MAX_SILENT_BEATS + 1):
                connection.beat()

    def allow(self, steps: float) -> None:
        for executor in self.executors.values():
            executor.allow(steps)

    def stream(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateStreamResponse]:
        return self.ingress.generate_stream(request, TENANT)

    async def permit_end(self, sequences: int = 1) -> None:
        """Permit the last steps, once the engines know that `sequences` have been ended.

        A lease that is withdrawn counts as one. With permits before that, steps could use them
        up, and the engine would not come to the end.
        """

        def ended() -> int:
            engines = self.engines.values()
            return sum(len(x.ended) + len(x._account.withdrawn) for x in engines)

        await self.until(lambda: ended() >= sequences)
        self.allow(3)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(0)

    def leases(self) -> int:
        return self.router.status().router.leases

    def free_sealed_pages(self, name: str = "g0") -> int:
        groups = {group.group: group for group in self.router.status().router.groups}
        return groups[name].capacity.sealed - groups[name].used.sealed

    async def at_rest(self) -> None:
        """Wait until nothing is leased or held; check that every lease has ended exactly once."""
        await self.until(lambda: self.leases() == 0)
        status = self.router.status().router
        assert status.queue_depth == 0
        for group in status.groups:
            assert (group.sequences, group.used_bytes) == (0, 0)
            assert group.used == PageNeed(0, 0)
        assert not self.router.callers
        for placement in self.router.granted:
            lease_id = placement.lease.lease_id
            ends = self.router.lease_ends[lease_id]
            assert ends == 1 or lease_id in self.router.voided, f"{lease_id} ended {ends} times"
        for leader in self.leaders.values():
            if leader.failed is None:
                await asyncio.wait_for(leader._idle.wait(), PATIENCE_S)
                await self.until(lambda: leader.account.loads_current)  # noqa: B023
                loads = leader.account.loads
                assert (loads.running, loads.waiting, loads.leases) == (0, 0, ())
                assert loads.pool.used == PageNeed(0, 0)


class ScriptedIngress:
    """An ingress whose messages the test chooses."""

    def __init__(self) -> None:
        self._answers: asyncio.Queue[object] = asyncio.Queue()
        self._connections: list[Link] = []

    async def answer(self) -> object:
        return await asyncio.wait_for(self._answers.get(), PATIENCE_S)

    def received(self, message: object) -> None:
        if not isinstance(message, Waiting):
            self._answers.put_nowait(message)

    def lost(self) -> None: ...

    async def connect_router(self, built: Machine) -> None:
        address = await built.find_router()
        self.router = await connect(address, IDENTITY, TO_INGRESS_FROM_ROUTER, lambda _: self)
        self._connections.append(self.router)

    async def place(self, request: PlaceRequest, call: int = 1) -> Placed:
        self.router.send(Place(call, request))
        answer = await self.answer()
        assert isinstance(answer, Placed)
        return answer

    async def submit(self, placed: Placed, max_tokens: int) -> None:
        engine = await connect(placed.address, IDENTITY, TO_INGRESS_FROM_ENGINE, lambda _: self)
        self._connections.append(engine)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        prompt = np.arange(20, dtype="<i4").tobytes()
        sequence = NewSequence(f"{placed.lease.lease_id}.0", params)
        engine.send(Submit(placed.lease, prompt, (sequence,)))

    def die(self) -> None:
        for connection in self._connections:
            connection.abort()


async def scripted_ingress(built: Machine) -> ScriptedIngress:
    made = ScriptedIngress()
    await made.connect_router(built)
    return made


@asynccontextmanager
async def machine(
    groups: int = 1,
    config: RouterConfig | None = None,
    budget: int = 400,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Machine]:
    """A running cluster, which must be at rest in the end. budget: of each engine's memory"""
    built = Machine(groups, config or RouterConfig(), budget, clock)
    # Nobody here waits until a lost engine counts as up again; all pages are audited each time.
    with (
        mock.patch.object(link, "CONNECT_TIMEOUT_S", PATIENCE_S),
        mock.patch.object(engine_thread, "AUDIT_PERIOD_S", 0.0),
    ):
        await built.start()
        try:
            yield built
            built.allow(MANY)
            await built.at_rest()
        finally:
            await built.stop()
