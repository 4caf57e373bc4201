"""What a second step in flight hides: how long ranks have no step, between their steps.

    python -m benchmarks.overlap [--sequences 1 16 256] [--step-ms 6] [--steps 150] [--pairs 4]
        [--json FILE]

An engine decodes over a rank in another process, which speaks the channel's protocol and takes
`--step-ms` for a step, asleep, so that the leader is the only one that needs a CPU, as next to a
GPU. The same sequences decode in turn with one step in flight and with two. Per step:

    gap ms      from the end of a step to the beginning of the next: the device is idle; median
    leader ms   CPU time of the engine's thread: to decide, encode, send, receive and commit
    period ms   from one plan to the next, median

With two in flight the next plan is there when a step ends, and what remains of the gap is the
rank's own part: to send an answer and decode a plan. The leader and the rank need a CPU each.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from kvmesh.workers.channel import Allocated, ChannelExecutor, Close, RankEnd
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.executor import Allocation, RankDescription
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams

CONTEXT = 4096
DESCRIPTION = RankDescription(
    model="none",
    model_revision="none",
    dtype="bfloat16",
    vocab_size=50_000,
    max_model_len=2 * CONTEXT,
    eos_token_ids=(),
    sink_pages=1,
    recent_pages=2,
    hot_page_bytes=4,
    sealed_page_bytes=1,
    kv_budget_bytes=1 << 16,
    head_dim=64,
)


@dataclass(frozen=True)
class Row:
    """Figures of one kind of run, as in the file's description."""

    sequences: int
    in_flight: int
    gap_ms: float
    period_ms: float
    leader_ms: float


def rank(endpoint: str, step_s: float) -> None:
    """A rank's process: steps take their time, and their gaps go to stdout when it is closed."""
    end = RankEnd(endpoint)
    end.send(DESCRIPTION)
    times: list[tuple[int, float, float]] = []
    ended_s = time.perf_counter()
    while not isinstance(message := end.receive(600.0), Close | None):
        if isinstance(message, Allocation):
            end.send(Allocated())
        elif isinstance(message, StepPlan):
            began_s = time.perf_counter()
            times.append((len(message.chunks), began_s - ended_s, began_s))
            time.sleep(step_s)
            ended_s = time.perf_counter()
            sampled = [SampledToken(7) for chunk in message.chunks if chunk.sample]
            end.send(StepResult(message.step, sampled, 0.0))
    end.close()
    print(json.dumps(times))


def measure(sequences: int, in_flight: int, step_s: float, steps: int) -> Row:
    """A run of its own: decoding alone, after all prompts."""
    executor = ChannelExecutor(1)
    executor.max_in_flight = in_flight
    words = [sys.executable, __file__, "--rank", executor.endpoints[0], "--step-ms"]
    process = subprocess.Popen([*words, str(1e3 * step_s)], stdout=subprocess.PIPE)
    config = EngineConfig(
        model="none",
        page_size=64,
        max_num_seqs=sequences,
        max_num_batched_tokens=8192,
        prefix_cache=False,
    )
    engine = Engine(config, executor)
    params = SamplingParams(temperature=0.0, max_tokens=CONTEXT, ignore_eos=True)
    for number in range(sequences):
        prompt = np.random.default_rng(number).integers(0, 50_000, 64).astype(np.int32)
        engine.add(EngineRequest(f"r{number}", prompt, params))
    while any(seq.num_output == 0 for seq in engine._live.values()):
        engine.step()
    leader_s = time.thread_time()
    for _ in range(steps):
        engine.step()
    leader_s = time.thread_time() - leader_s
    executor.close()
    output, _ = process.communicate(timeout=60)
    decoding = [found for found in json.loads(output) if found[0] == sequences][10:]
    _, gaps, starts = zip(*decoding, strict=True)
    return Row(
        sequences=sequences,
        in_flight=in_flight,
        gap_ms=round(1e3 * statistics.median(gaps), 3),
        period_ms=round(1e3 * float(np.median(np.diff(starts))), 3),
        leader_ms=round(1e3 * leader_s / steps, 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 16, 256])
    parser.add_argument("--step-ms", type=float, default=6.0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    step_s = options.step_ms / 1e3
    if options.rank:
        rank(options.rank, step_s)
        return
    rows = []
    for sequences in options.sequences:
        found: dict[int, list[Row]] = {1: [], 2: []}
        for pair in range(options.pairs):
            for in_flight in (1, 2) if pair % 2 else (2, 1):
                found[in_flight].append(measure(sequences, in_flight, step_s, options.steps))
        for runs in found.values():
            medians = {
                name: statistics.median(getattr(run, name) for run in runs)
                for name in ("gap_ms", "period_ms", "leader_ms")
            }
            rows.append(asdict(Row(sequences, runs[0].in_flight, **medians)))
            print(rows[-1], flush=True)
    if options.json:
        report = {"machine": platform.machine(), "step_ms": options.step_ms, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
