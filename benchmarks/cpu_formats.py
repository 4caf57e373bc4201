"""CPU time of decode steps and of prompts by KV format, on the embedded model.

    python -m benchmarks.cpu_formats [--kv-format F,…] [--prompts N,…] [--threads N] [--json FILE]

There is an engine for each format. Each computes the same prompts, and then the engines take
64 steps in turn, so that a busy machine slows all of them. A stream seals a page in one of these
steps: the mean has that, the median does not. Reported are seconds and milliseconds of the first
format, and what the others take next to it. Sixteen streams are measured with prompts of 64 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.control_plane.__main__ import HERE, commit_of, conditions
from benchmarks.engine import make_engine, prompt_of
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.engine import Engine
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams

RESULTS = HERE / "benchmarks" / "results" / "cpu_formats.json"
STEPS = 64  # a page
MAX_STREAMS = 16
SHORT_PROMPT = 64

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time of one format. prefill_s: until every stream has a token"""

    streams: int
    prompt_tokens: int
    kv_format: str
    prefill_s: float
    median_step_ms: float
    mean_step_ms: float


def prefill_s(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(index), np.array(prompt, np.int32), params))
    began_s, answered = time.process_time(), set[str]()
    while len(answered) < len(prompts):
        answered.update(delta.request_id for delta in engine.step() if delta.token_ids)
    return time.process_time() - began_s


def step_s(engine: Engine) -> float:
    began_s = time.process_time()
    engine.step()
    return time.process_time() - began_s


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def measure(engines: dict[str, Engine], prompts: list[list[int]]) -> list[Cost]:
    tokens = 2 * STEPS  # more than are looked at, also of the streams that start first
    spent = {name: prefill_s(engine, prompts, tokens) for name, engine in engines.items()}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(STEPS):
        for name, engine in engines.items():
            steps[name].append(step_s(engine) * 1e3)
    for engine in engines.values():
        finish(engine)
    return [
        Cost(
            len(prompts),
            len(prompts[0]),
            name,
            spent[name],
            statistics.median(steps[name]),
            statistics.mean(steps[name]),
        )
        for name in engines
    ]


def table_of(costs: list[Cost]) -> Table:
    formats = list(dict.fromkeys(cost.kv_format for cost in costs))
    table = Table("streams", "prompt", "", *formats)
    for key, group in itertools.groupby(costs, lambda cost: (cost.streams, cost.prompt_tokens)):
        row = list(group)
        for what, unit in (("prefill_s", "s"), ("median_step_ms", "ms"), ("mean_step_ms", "ms")):
            first, *others = (getattr(cost, what) for cost in row)
            ratios = (f"{other / first:.2f}" for other in others)
            table.add_row(*map(str, key), what.split("_")[0], f"{first:.1f} {unit}", *ratios)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv-format", default="int8,k8v4,k4v4")
    parser.add_argument("--prompts", default="100,512,2048,6000", help="tokens, of one stream")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help=f"such as {RESULTS.relative_to(HERE)}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = [get_format(name).name for name in arguments.kv_format.split(",")]
    engines = {name: make_engine(name, MAX_STREAMS, arguments.threads) for name in names}
    seeds = itertools.count()
    measure(engines, [prompt_of(200, next(seeds))])  # loops are compiled
    cases = [(1, int(length)) for length in arguments.prompts.split(",")]
    costs: list[Cost] = []
    for streams, length in (*cases, (MAX_STREAMS, SHORT_PROMPT)):
        console.log(f"{streams} streams, prompts of {length} tokens")
        costs += measure(engines, [prompt_of(length, next(seeds)) for _ in range(streams)])
    if arguments.json:
        report = {**conditions(), "commit": commit_of(HERE), "threads": arguments.threads}
        rows = [asdict(cost) for cost in costs]
        arguments.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
    Console().print(table_of(costs))


if __name__ == "__main__":
    main()
