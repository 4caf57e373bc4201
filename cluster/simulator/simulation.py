"""The event loop, and the two ways in which a request reaches an engine."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.outcome import Granted, Grown, Outcome, Refused
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.simulator.engine import SimEngine
from kvmesh.cluster.simulator.policies import PEERS, POLICIES, WORST_CASE
from kvmesh.cluster.simulator.sequence import SimSequence
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS, TraceRequest
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseWant
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageNeed

TICK_S = 0.1
PAGES_S = 2.0  # between reports of evicted pages


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated.

    shapes: one for each group
    max_tokens: what clients allow for output; the real length is the trace's
    """

    shapes: Sequence[EngineShape]
    requests: Sequence[TraceRequest]
    max_tokens: int
    router: RouterConfig = field(default_factory=RouterConfig)
    seed: int = 0

    def service(self, index: int) -> ServiceTime:
        return ServiceTime.of(self.shapes[index])

    def allowed(self, request: TraceRequest) -> int:
        return max(self.max_tokens, request.output_tokens)


@dataclass(slots=True)
class Run:
    """The result of a simulation."""

    policy: str
    sequences: list[SimSequence]
    engines: list[SimEngine]
    ended_at: float


class Dispatcher(Protocol):
    def arrive(self, seq: SimSequence, now: float) -> None: ...

    def tick(self, now: float) -> None: ...

    @property
    def idle(self) -> bool: ...


def simulate(scenario: Scenario, policy: str) -> Run:
    """Run all requests to their end under one policy. Raises ValueError for an unknown one."""
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    fleet = _Fleet()
    dispatcher: Dispatcher
    if policy in PEERS:
        dispatcher = _Peer(fleet, scenario, policy)
    else:
        dispatcher = _Own(fleet, scenario, clairvoyant=policy == "clairvoyant")
    sequences = [SimSequence(request, scenario.allowed(request)) for request in scenario.requests]
    ended_at = fleet.run(sequences, dispatcher)
    return Run(policy, sequences, fleet.engines, ended_at)


class _Fleet:
    """Engines and the clock."""

    def __init__(self) -> None:
        self.engines: list[SimEngine] = []
        self.now = 0.0
        self._wakes: list[tuple[float, int, int]] = []
        self._count = 0

    def send(self, seq: SimSequence, index: int) -> None:
        seq.group = index
        self._wake_at(self.engines[index].submit(seq, self.now), index)

    def run(self, sequences: Sequence[SimSequence], dispatcher: Dispatcher) -> float:
        arrivals = iter(sequences)
        upcoming = next(arrivals, None)
        tick_at = 0.0
        while upcoming is not None or self._wakes or not dispatcher.idle:
            arrive_at = upcoming.request.arrival_s if upcoming else float("inf")
            wake_at = self._wakes[0][0] if self._wakes else float("inf")
            if tick_at <= min(arrive_at, wake_at):
                self.now = tick_at
                dispatcher.tick(tick_at)
                tick_at += TICK_S
            elif arrive_at <= wake_at and upcoming is not None:
                self.now = arrive_at
                dispatcher.arrive(upcoming, arrive_at)
                upcoming = next(arrivals, None)
            else:
                _, _, index = heapq.heappop(self._wakes)
                self.now = wake_at
                self._wake_at(self.engines[index].wake(wake_at), index)
        return self.now

    def _wake_at(self, at: float | None, index: int) -> None:
        if at is not None:
            self._count += 1
            heapq.heappush(self._wakes, (at, self._count, index))


class _Peer:
    """Another system's rule, which forwards every request on arrival."""

    idle = True

    def __init__(self, fleet: _Fleet, scenario: Scenario, policy: str) -> None:
        self._fleet = fleet
        self._rule = PEERS[policy](scenario.seed)
        fleet.engines = [
            SimEngine(index, shape, scenario.service(index), worst_case=policy in WORST_CASE)
            for index, shape in enumerate(scenario.shapes)
        ]

    def arrive(self, seq: SimSequence, now: float) -> None:
        candidates = [x for x in self._fleet.engines if x.fits_ever(seq.request, seq.max_tokens)]
        if not candidates:
            seq.refused = True
            return
        self._fleet.send(seq, candidates[self._rule(seq.request, candidates)].index)

    def tick(self, now: float) -> None:
        """Does nothing: no request waits here."""


class _Own:
    """The core of kvmesh's own router, with the simulation's clock."""

    def __init__(self, fleet: _Fleet, scenario: Scenario, *, clairvoyant: bool) -> None:
        self._fleet = fleet
        self._clairvoyant = clairvoyant
        # Groups may differ in KV format, which the pace of prompts does not depend on.
        shape = scenario.shapes[0]
        pace = scenario.service(0).pace(shape.max_num_batched_tokens)
        tuning = replace(scenario.router.tuning, pace=pace)
        self._router = Router(replace(scenario.router, tuning=tuning), epoch=1, now=0.0)
        self._waiting: dict[str, SimSequence] = {}  # by request id
        self._leased: dict[str, SimSequence] = {}  # by lease id
        self._pages_at = 0.0
        self._pages = BLOCK_TOKENS // shape.page_size
        self._infos: list[EngineInfo] = []
        for index, shape in enumerate(scenario.shapes):
            engine = SimEngine(
                index,
                shape,
                scenario.service(index),
                on_want=self._want,
                on_first_token=self._first_token,
                on_finish=self._finish,
            )
            fleet.engines.append(engine)
            self._infos.append(engine_info(engine, shape))
            self._router.group_up(f"g{index}", self._infos[-1], (), 0.0)

    @property
    def idle(self) -> bool:
        return not self._waiting

    def arrive(self, seq: SimSequence, now: float) -> None:
        request = seq.request
        self._waiting[request.request_id] = seq
        place = PlaceRequest(
            request.request_id,
            request.prompt_tokens,
            request.output_tokens if self._clairvoyant else seq.max_tokens,
            tenant=request.tenant,
            page_hashes=tuple(
                name
                for block in request.blocks
                for name in (block.to_bytes(8, "little"),) * self._pages
            ),
        )
        self._settle(self._router.place(place, now), now)

    def tick(self, now: float) -> None:
        if now >= self._pages_at:
            self._pages_at = now + PAGES_S
            for engine in self._fleet.engines:
                evicted, engine.pool.evicted = engine.pool.evicted, []
                names = [block.to_bytes(8, "little") for block in evicted]
                self._router.fleet.pages_changed(f"g{engine.index}", (), names)
        self._settle(self._router.tick(now), now)

    def _settle(self, outcomes: Iterable[Outcome], now: float) -> None:
        for outcome in outcomes:
            match outcome:
                case Granted(placement=placement):
                    seq = self._waiting.pop(placement.request_id)
                    self._leased[placement.lease.lease_id] = seq
                    seq.lease_id = placement.lease.lease_id
                    seq.covered = placement.leased_output_tokens
                    self._fleet.send(seq, int(placement.group[1:]))
                    self._report(seq, AccountUpdate(arrived=(placement.lease,)), now)
                case Refused(request_id=request_id):
                    self._waiting.pop(request_id).refused = True
                case Grown(lease=lease):
                    seq = self._leased[lease.lease_id]
                    geometry = self._infos[seq.group].geometry
                    tokens = geometry.tokens_within(lease.sealed_pages)
                    seq.covered = tokens - seq.request.prompt_tokens

    def _want(self, seq: SimSequence, now: float) -> None:
        prompt = seq.request.prompt_tokens
        want = LeaseWant(seq.lease_id, prompt, prompt + seq.emitted + 1)
        self._report(seq, AccountUpdate(wants=(want,)), now)

    def _first_token(self, seq: SimSequence, now: float) -> None:
        self._report(seq, AccountUpdate(first_tokens=(seq.lease_id,)), now)

    def _finish(self, seq: SimSequence, now: float) -> None:
        del self._leased[seq.lease_id]
        end = LeaseEnd(seq.lease_id, seq.request.output_tokens)
        self._report(seq, AccountUpdate(ended=(end,)), now)

    def _report(self, seq: SimSequence, update: AccountUpdate, now: float) -> None:
        self._settle(self._router.account(f"g{seq.group}", update, now), now)


def engine_info(engine: SimEngine, shape: EngineShape) -> EngineInfo:
    """A simulated engine as the router sees it: every sequence holds one hot page."""
    geometry = shape.geometry
    return EngineInfo(
        epoch="1",
        model=shape.model.name,
        model_revision="",
        kv_format=shape.kv_format.name,
        dtype="bfloat16",
        tp=shape.gpus,
        geometry=replace(geometry, sink_pages=0, recent_pages=0),
        capacity=PageNeed(hot=engine.max_num_seqs, sealed=engine.pool.total_pages),
        max_model_len=shape.model.max_model_len,
        vocab_size=0,
        max_num_seqs=engine.max_num_seqs,
    )
