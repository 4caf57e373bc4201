"""The simulator's service-time model compared with the engine, on this machine's CPU.

The model's coefficients are fitted to half of a workload's steps. Then another workload, with
arrival times, runs through the engine and through the simulated engine, and the two are
compared request by request.

    python -m benchmarks.service_time [--requests N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvmesh.cluster.simulator.engine import SimEngine
from kvmesh.cluster.simulator.hardware import GPUS, MODELS
from kvmesh.cluster.simulator.sequence import SimSequence
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.trace import TraceRequest
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import local_executor
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.plan import StepPlan
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams

KV_FORMAT = "int8"
BUDGET_TOKENS = 512
MAX_SEQS = 16


@dataclass(frozen=True, slots=True)
class Step:
    """What a step computed, and its duration."""

    new_tokens: int
    pairs: float
    decoding: int
    context_tokens: int
    seconds: float


class RecordingExecutor:
    """An executor that records what it computes."""

    def __init__(self, config: EngineConfig) -> None:
        self._inner = local_executor(config)
        self.num_ranks = self._inner.num_ranks
        self.describe = self._inner.describe
        self.divergences = self._inner.divergences
        self.allocate = self._inner.allocate
        self.close = self._inner.close
        self.result = self._inner.result
        self.max_in_flight = self._inner.max_in_flight
        self.last: StepPlan | None = None

    def submit(self, plan: StepPlan) -> None:
        self.last = plan
        self._inner.submit(plan)


def step_of(plan: StepPlan, seconds: float) -> Step:
    new = decoding = context = 0
    pairs = 0.0
    for chunk in plan.chunks:
        if chunk.num_tokens == 1:
            decoding += 1
            context += chunk.end
        else:
            new += chunk.num_tokens
            pairs += chunk.num_tokens * (chunk.start + 0.5 * chunk.num_tokens)
    return Step(new, pairs, decoding, context, seconds)


def made_requests(count: int, per_s: float, seed: int) -> list[TraceRequest]:
    chance = random.Random(seed)
    now, requests = 0.0, []
    for index in range(count):
        now += chance.expovariate(per_s)
        prompt = 16 + min(int(chance.lognormvariate(4.8, 0.8)), 800)
        output = 1 + min(int(chance.lognormvariate(3.2, 0.6)), 80)
        requests.append(TraceRequest(f"{seed}-{index}", now, prompt, output))
    return requests


def drive(
    engine: Engine, executor: RecordingExecutor, requests: Sequence[TraceRequest]
) -> tuple[list[Step], dict[str, tuple[float, float]]]:
    """Feed the engine in real time. Returns its steps, and (TTFT, end to end) by request."""
    steps: list[Step] = []
    first: dict[str, float] = {}
    times: dict[str, tuple[float, float]] = {}
    arrivals = list(reversed(requests))
    by_id = {request.request_id: request for request in requests}
    chance = np.random.default_rng(0)
    begin = time.perf_counter()
    while arrivals or engine.has_work:
        now = time.perf_counter() - begin
        while arrivals and arrivals[-1].arrival_s <= now:
            request = arrivals.pop()
            tokens = chance.integers(100, 40_000, request.prompt_tokens).astype(np.int32)
            params = SamplingParams(
                temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True
            )
            engine.add(EngineRequest(request.request_id, tokens, params))
        if not engine.has_work:
            time.sleep(0.001)
            continue
        step_begin = time.perf_counter()
        deltas = engine.step()
        end = time.perf_counter()
        assert executor.last is not None
        steps.append(step_of(executor.last, end - step_begin))
        for delta in deltas:
            arrival = by_id[delta.request_id].arrival_s
            first.setdefault(delta.request_id, end - begin - arrival)
            if delta.finish_reason is not None:
                times[delta.request_id] = (first[delta.request_id], end - begin - arrival)
    return steps, times


def fit(steps: Sequence[Step]) -> ServiceTime:
    """Least squares of the relative error; coefficients that come out negative are dropped."""
    rows = np.array([[1.0, s.new_tokens + s.decoding, s.pairs, s.context_tokens] for s in steps])
    seconds = np.array([s.seconds for s in steps])
    kept = list(range(rows.shape[1]))
    while True:
        scaled = rows[:, kept] / seconds[:, None]
        found, *_ = np.linalg.lstsq(scaled, np.ones(len(steps)), rcond=None)
        if (found >= 0).all():
            break
        kept.remove(kept[int(np.argmin(found))])
    values = np.zeros(rows.shape[1])
    values[kept] = found
    constant, token, pair, context = (float(value) for value in values)
    return ServiceTime(weights_s=0.0, token_s=token, pair_s=pair, kv_s=context, step_s=constant)


def simulated(service: ServiceTime, requests: Sequence[TraceRequest]) -> list[SimSequence]:
    shape = EngineShape(
        GPUS["h100"],  # only its pool is used here, and it never fills
        MODELS["smollm2-135m"],
        get_format(KV_FORMAT),
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=BUDGET_TOKENS,
    )
    engine = SimEngine(0, shape, service)
    sequences = [SimSequence(request, request.output_tokens) for request in requests]
    arrivals = list(reversed(sequences))
    wakes: list[float] = []
    while arrivals or wakes:
        wake_at = min(wakes, default=float("inf"))
        if arrivals and arrivals[-1].request.arrival_s <= wake_at:
            seq = arrivals.pop()
            at = engine.submit(seq, seq.request.arrival_s)
        else:
            wakes.remove(wake_at)
            at = engine.wake(wake_at)
        if at is not None:
            wakes.append(at)
    return sequences


def compare(
    times: dict[str, tuple[float, float]], sequences: Sequence[SimSequence]
) -> dict[str, float]:
    """Mean real time, and the simulation's mean error relative to it."""
    figures: dict[str, float] = {}
    for index, name in enumerate(("ttft", "end_to_end")):
        real = np.array([times[seq.request.request_id][index] for seq in sequences])
        ends = [(seq.first_token_at, seq.finished_at)[index] for seq in sequences]
        predicted = np.array(ends) - np.array([seq.request.arrival_s for seq in sequences])
        figures[f"{name}_mean_s"] = float(real.mean())
        figures[f"{name}_bias"] = float(predicted.mean() / real.mean() - 1)
        figures[f"{name}_mean_error"] = float(np.abs(predicted - real).mean() / real.mean())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = EngineConfig(
        model=EMBEDDED_NAME,
        kv_format=KV_FORMAT,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=BUDGET_TOKENS,
        prefix_cache=False,
        kv_probe="off",
    )
    executor = RecordingExecutor(config)
    engine = Engine(config, executor)
    drive(engine, executor, made_requests(4, 4.0, seed=3))  # warm up
    steps, _ = drive(engine, executor, made_requests(arguments.requests, 0.8, seed=1))
    service = fit(steps[::2])
    rest = steps[1::2]
    predicted = [service.step(s.new_tokens, s.pairs, s.decoding, s.context_tokens) for s in rest]
    real = [s.seconds for s in rest]
    unseen = made_requests(arguments.requests, 0.6, seed=2)
    _, times = drive(engine, executor, unseen)
    result = {
        "machine": platform.processor() or platform.machine(),
        "coefficients": asdict(service),
        "steps": len(rest),
        "step_mean_error": float(np.abs(np.array(predicted) - real).sum() / np.sum(real)),
        **compare(times, simulated(service, unseen)),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
