"""The simulated engine, step by step."""

from __future__ import annotations

import pytest

from kvmesh.cluster.simulator.cache import SimPool
from kvmesh.cluster.simulator.engine import SimEngine
from kvmesh.cluster.simulator.hardware import GPUS, MODELS
from kvmesh.cluster.simulator.sequence import SimSequence
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS, TraceRequest
from kvmesh.kernels.formats.registry import get_format

SHAPE = EngineShape(GPUS["h100"], MODELS["llama-3-8b"], get_format("exact"))
SERVICE = ServiceTime(weights_s=0.01, token_s=1e-5, pair_s=1e-9, kv_s=1e-7, step_s=0.001)


def drive(engine: SimEngine, arrivals: list[tuple[float, SimSequence]]) -> float:
    """Deliver arrivals and wake-ups in order of time."""
    wakes: list[float] = []
    pending = sorted(arrivals, key=lambda pair: pair[0])
    now = 0.0
    while pending or wakes:
        if pending and (not wakes or pending[0][0] <= min(wakes)):
            now, seq = pending.pop(0)
            at = engine.submit(seq, now)
        else:
            now = min(wakes)
            wakes.remove(now)
            at = engine.wake(now)
        if at is not None:
            wakes.append(at)
    return now


def sequence(name: str, prompt: int, output: int, blocks: tuple[int, ...] = ()) -> SimSequence:
    return SimSequence(TraceRequest(name, 0.0, prompt, output, blocks), 4096)


def test_a_single_request_takes_the_modelled_time() -> None:
    engine = SimEngine(0, SHAPE, SERVICE)
    seq = sequence("a", 5000, 11)
    end = drive(engine, [(0.0, seq)])
    assert seq.first_token_at == pytest.approx(SERVICE.alone(5000, 2048))
    steps = sum(SERVICE.step(0, 0.0, 1, 5000 + i) for i in range(10))
    assert end == pytest.approx(seq.first_token_at + steps)
    assert engine.pool.used_pages == 0
    assert engine.in_flight == 0


def test_an_arrival_ends_a_run_of_decode_steps_at_the_next_boundary() -> None:
    alone, first = SimEngine(0, SHAPE, SERVICE), sequence("a", 1000, 500)
    drive(alone, [(0.0, first)])
    engine, seq, late = SimEngine(0, SHAPE, SERVICE), sequence("a", 1000, 500), sequence("b", 64, 1)
    drive(engine, [(0.0, seq), (1.0, late)])
    assert 1.0 < late.first_token_at < 1.0 + 2 * SERVICE.step(64, 2048, 1, 1200)
    assert seq.finished_at == pytest.approx(first.finished_at, rel=1e-2)
    assert engine.pool.used_pages == 0


def test_shared_blocks_are_computed_once_and_stay_cached() -> None:
    engine = SimEngine(0, SHAPE, SERVICE)
    one, two = sequence("a", 1100, 5, (1, 2)), sequence("b", 1200, 5, (1, 2))
    drive(engine, [(0.0, one), (5.0, two)])
    assert (one.cached_tokens, two.cached_tokens) == (0, 1024)
    assert two.computed_tokens == 176
    assert engine.pool.cached_pages == 16
    assert engine.pool.used_pages == 0


def test_the_youngest_is_preempted_and_all_end() -> None:
    engine = SimEngine(0, SHAPE, SERVICE)
    engine.pool.total_pages = 100
    seqs = [sequence(name, 2000, 1200) for name in "abc"]
    drive(engine, [(i * 0.1, seq) for i, seq in enumerate(seqs)])
    assert seqs[0].preemptions == 0
    assert sum(seq.preemptions for seq in seqs) > 0
    assert all(seq.finished_at > 0 for seq in seqs)
    assert engine.pool.used_pages == 0


def test_worst_case_reservation_never_preempts() -> None:
    engine = SimEngine(0, SHAPE, SERVICE, worst_case=True)
    engine.pool.total_pages = 100
    seqs = [sequence(name, 2000, 1200) for name in "abc"]
    drive(engine, [(i * 0.1, seq) for i, seq in enumerate(seqs)])
    assert sum(seq.preemptions for seq in seqs) == 0
    assert seqs[0].finished_at <= seqs[1].started_at


def test_a_pool_evicts_the_least_recently_used_and_a_prefix_from_its_end() -> None:
    pool = SimPool(total_pages=40, page_size=BLOCK_TOKENS // 8)
    for blocks in ([1, 2], [3, 4]):
        assert pool.take(16)
        pool.name(blocks)
        pool.drop(blocks)
    assert pool.match([1, 2]) == 2
    assert pool.take(16)
    assert (pool.match([1, 2]), pool.match([3, 4])) == (1, 2)
    assert not pool.take(25)
    assert pool.used_pages == 16
    assert pool.evicted == [2]
