"""What steps in flight hide: decode with rank processes, with one step in flight and with two.

    python -m benchmarks.overlap [--tp 1] [--sequences 1 8] [--tokens 96] [--pairs 5] [--json FILE]

One engine over `tp` rank processes of the embedded model decodes the same prompts again and again,
in turn with one step in flight and with two (ABBA), greedily and, with `--top-p`, sampled. Tokens
must be the same. Per step:

    wall ms        from one result to the next, median over the runs of a kind
    ranks ms       CPU time of the rank processes; of the leader: CPU time of the engine's thread
    idle ms        for which rank 0 had no step: wall, less what it spent between a plan and its
                   answer; only without overlap does the leader's work add to it
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import LocalProcesses
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """Of one kind: medians of milliseconds per step, over runs."""

    sequences: int
    in_flight: int
    wall_ms: float
    ranks_cpu_ms: float
    leader_cpu_ms: float


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


@contextmanager
def started(config: EngineConfig) -> Iterator[tuple[Engine, LocalProcesses]]:
    executor = LocalProcesses(config)
    try:
        yield Engine(config, executor), executor
    finally:
        executor.close()


class Decoding:
    """The same prompts, again and again."""

    def __init__(self, engine: Engine, executor: LocalProcesses, top_p: float, tokens: int) -> None:
        self._engine, self._executor = engine, executor
        self._tokens = tokens
        self._top_p = top_p
        self._pids = [process.pid for process in executor._processes]

    def once(self, sequences: int, in_flight: int) -> tuple[list[list[int]], Run]:
        engine = self._engine
        self._executor.max_in_flight = in_flight
        random = np.random.default_rng(0)
        for number in range(sequences):
            params = SamplingParams(
                temperature=0.0 if self._top_p == 1.0 else 0.8,
                top_p=self._top_p,
                seed=number,
                max_tokens=self._tokens,
                ignore_eos=True,
            )
            prompt = random.integers(5, 40_000, 24).astype(np.int32)
            engine.add(EngineRequest(f"r{number}", prompt, params))
        output: dict[str, list[int]] = {f"r{number}": [] for number in range(sequences)}

        def step() -> None:
            for delta in engine.step():
                output[delta.request_id] += delta.token_ids

        while not all(output.values()):
            step()  # prompts
        ranks_s, leader_s = sum(map(cpu_s, self._pids)), time.thread_time()
        start_s, steps = time.perf_counter(), 0
        while engine.has_work:
            step()
            steps += 1
        wall_s = time.perf_counter() - start_s
        leader_s = time.thread_time() - leader_s
        ranks_s = sum(map(cpu_s, self._pids)) - ranks_s
        while engine.awaits_result:
            engine.step()
        per_step = (1e3 * seconds / steps for seconds in (wall_s, ranks_s, leader_s))
        return list(output.values()), Run(sequences, in_flight, *per_step)


def medians(runs: list[Run]) -> Run:
    wall, ranks, leader = (
        round(statistics.median(getattr(run, name) for run in runs), 3)
        for name in ("wall_ms", "ranks_cpu_ms", "leader_cpu_ms")
    )
    return Run(runs[0].sequences, runs[0].in_flight, wall, ranks, leader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = EngineConfig(
        model=EMBEDDED_NAME,
        tp=options.tp,
        device="cpu",
        kv_memory_bytes=200 << 20,
        kv_probe="off",
        prefix_cache=False,
        threads_per_rank=1,
    )
    rows = []
    with started(config) as (engine, executor):
        decoding = Decoding(engine, executor, options.top_p, options.tokens)
        for sequences in options.sequences:
            decoding.once(sequences, 1)  # compiles
            runs: dict[int, list[Run]] = {1: [], 2: []}
            outputs = []
            for pair in range(options.pairs):
                for in_flight in (1, 2) if pair % 2 else (2, 1):
                    output, run = decoding.once(sequences, in_flight)
                    outputs.append(output)
                    runs[in_flight].append(run)
            assert all(output == outputs[0] for output in outputs), "tokens depend on overlap"
            ratios = [two.wall_ms / one.wall_ms for one, two in zip(runs[1], runs[2], strict=True)]
            ratio = statistics.median(ratios)
            for found in runs.values():
                rows.append(asdict(medians(found)))
                print(medians(found))
            print(f"{sequences} sequences: wall with overlap × {ratio:.3f} ({sorted(ratios)})")
    if options.json:
        options.json.write_text(json.dumps({"tp": options.tp, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
