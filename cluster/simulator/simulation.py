"""The event loop, and the two ways a request gets to an engine."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.group import REFERENCE_BITS, GroupSpec
from kvmesh.cluster.routing.pace import Pace
from kvmesh.cluster.routing.request import Granted, PlaceRequest, Refused
from kvmesh.cluster.routing.router import Changes, Router
from kvmesh.cluster.simulator.engine import SimEngine, SimSequence
from kvmesh.cluster.simulator.policies import PEERS, POLICIES, WORST_CASE
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS, TraceRequest
from kvmesh.workers.request import EngineLoads, LeaseTerms, PoolLoads
from kvmesh.workers.sizes import PageGeometry, PageNeed

TICK_S = 0.1
REPORT_S = 2.0
NO_POOL = PoolLoads(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated.

    shapes: one for each group
    services: their step times; from the shapes if empty
    max_tokens: what clients allow for output; the real length is the trace's
    """

    shapes: Sequence[EngineShape]
    requests: Sequence[TraceRequest]
    max_tokens: int
    services: Sequence[ServiceTime] = ()
    router: RouterConfig = field(default_factory=RouterConfig)
    seed: int = 0

    def service(self, index: int) -> ServiceTime:
        return self.services[index] if self.services else ServiceTime.of(self.shapes[index])

    def allowed(self, request: TraceRequest) -> int:
        return max(self.max_tokens, request.output_tokens)


@dataclass(slots=True)
class Run:
    """What came of it."""

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
    """A rule that sends every request on at once."""

    idle = True

    def __init__(self, fleet: _Fleet, scenario: Scenario, policy: str) -> None:
        self._fleet = fleet
        self._rule = PEERS[policy](scenario.seed)
        fleet.engines = [
            SimEngine(index, shape, scenario.service(index), worst_case=policy in WORST_CASE)
            for index, shape in enumerate(scenario.shapes)
        ]

    def arrive(self, seq: SimSequence, now: float) -> None:
        able = [x for x in self._fleet.engines if x.fits_ever(seq.request, seq.max_tokens)]
        if not able:
            seq.refused = True
            return
        self._fleet.send(seq, able[self._rule(seq.request, able)].index)

    def tick(self, now: float) -> None:
        """Nothing waits here."""


class _Own:
    """The router itself: its core, told the simulation's time."""

    def __init__(self, fleet: _Fleet, scenario: Scenario, *, clairvoyant: bool) -> None:
        self._fleet = fleet
        self._clairvoyant = clairvoyant
        self._router = Router(scenario.router, epoch=1, now=0.0)
        self._live: dict[str, SimSequence] = {}
        self._asked: dict[str, PlaceRequest] = {}
        self._by_hash: list[dict[bytes, None]] = []
        self._report_at = 0.0
        self._pages = BLOCK_TOKENS // scenario.shapes[0].page_size
        for index, shape in enumerate(scenario.shapes):
            service = scenario.service(index)
            fleet.engines.append(
                SimEngine(
                    index,
                    shape,
                    service,
                    grow=self._grow,
                    on_first_token=self._first_token,
                    on_finish=self._finish,
                )
            )
            spec = group_spec(
                fleet.engines[index], shape, service.pace(shape.max_num_batched_tokens)
            )
            self._router.group_up(spec, 0.0)

    @property
    def idle(self) -> bool:
        return not self._router.queue_depth

    def arrive(self, seq: SimSequence, now: float) -> None:
        request = seq.request
        asked = PlaceRequest(
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
        self._live[request.request_id] = seq
        self._asked[request.request_id] = asked
        decision, changes = self._router.submit(asked, now)
        self._settle(changes)
        if isinstance(decision, Granted | Refused):
            self._settle(Changes((decision,)))

    def tick(self, now: float) -> None:
        if now >= self._report_at:
            self._report_at = now + REPORT_S
            self._report(now)
        self._settle(self._router.tick(now))

    def _report(self, now: float) -> None:
        for engine in self._fleet.engines:
            leases = tuple(
                LeaseTerms(seq.lease_id, 1, 0, 0) for seq in (*engine.waiting, *engine.running)
            )
            loads = EngineLoads("1", 0, 0, NO_POOL, leases, 0, 0, 0, 0, 0)
            self._settle(self._router.report(f"g{engine.index}", loads, now)[1])
            evicted, engine.pool.evicted = engine.pool.evicted, []
            names = [block.to_bytes(8, "little") for block in evicted]
            self._router.pages_changed(f"g{engine.index}", (), names, now)

    def _settle(self, changes: Changes) -> None:
        for outcome in changes.outcomes:
            seq = self._live[outcome.request_id]
            match outcome:
                case Granted(placement=placement):
                    seq.lease_id = placement.lease.lease_id
                    seq.covered = placement.leased_output_tokens
                    seq.promised_at = placement.promised_at
                    self._fleet.send(seq, int(placement.group[1:]))
                case Refused():
                    seq.refused = True
                    del self._live[outcome.request_id], self._asked[outcome.request_id]

    def _grow(self, seq: SimSequence) -> int | None:
        asked = self._asked[seq.request.request_id]
        growth = self._router.grow(seq.lease_id, asked, seq.emitted + 1, self._fleet.now)
        return None if growth is None else growth.output_tokens

    def _first_token(self, seq: SimSequence, now: float) -> None:
        self._settle(self._router.begun(seq.lease_id, now))

    def _finish(self, seq: SimSequence, now: float) -> None:
        del self._live[seq.request.request_id], self._asked[seq.request.request_id]
        self._settle(self._router.release(seq.lease_id, now, seq.request.output_tokens))


def group_spec(engine: SimEngine, shape: EngineShape, pace: Pace) -> GroupSpec:
    """A modelled engine as the router is told of it."""
    geometry = shape.geometry
    return GroupSpec(
        group=f"g{engine.index}",
        engine_epoch="1",
        capacity=PageNeed(hot=engine.max_num_seqs, sealed=engine.pool.total_pages),
        geometry=PageGeometry(
            shape.page_size, 0, 0, geometry.hot_page_bytes, geometry.sealed_page_bytes
        ),
        max_model_len=shape.model.max_model_len,
        max_sequences=engine.max_num_seqs,
        kv_format=shape.kv_format.name,
        quality=REFERENCE_BITS * geometry.sealed_page_bytes / geometry.hot_page_bytes,
        pace=pace,
    )
