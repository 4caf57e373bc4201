"""Requests per second at a ShareGPT-like mix of lengths, by KV format, with the same KV memory.

    python -m benchmarks.throughput [--model M] [--format F ...] [--requests N]
        [--kv-memory-mb M] [--page-size N] [--scale N] [--rounds R] [--seed S] [--json FILE]

All requests are there at the start, as in LMDeploy's `profile_throughput` and vLLM's
`benchmark_throughput`; the engine batches them continuously, in order, greedily, each to its
given length. Every format gets the same requests and the same bytes of KV, including hot pages,
and as many seats (`max_num_seqs`) as such sequences need to fill that memory. Formats alternate
within a round; a figure is the middle round's (of two, the faster one's), a gain the median of
the rounds' gains over `exact`. On a GPU the kernels are compared with plain torch before anything
is timed.

Lengths are log-normal with ShareGPT's published means, 161.31 prompt tokens and 337.99 output
tokens (Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention", 2023,
figure 11). The spread is our choice, sigma 1.0 and 0.7 of the logarithm. A sequence has at most
2048 tokens and a prompt half of them, as in vLLM's filter of the data (`--longest`), so the means
of a sample are lower; the actual means are reported.

On a CPU, time is the process's CPU time: the engine is a single thread there, and wall time on a
shared machine would include other processes. `--scale 4` divides lengths, pages and memory by 4:
the same number of pages per sequence at a quarter of the work, so that enough requests can wait.

--model embedded serves the embedded model; llama-3-8b and tiny are shapes with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decode_steps import fill
from benchmarks.device import DEVICE, conditions, free_bytes
from benchmarks.gate import gate
from benchmarks.random_model import (
    SHAPES,
    ModelShape,
    RandomModelExecutor,
    dtype_on,
    random_model,
)
from kvmesh.cluster.bench.lengths import (
    SHAREGPT_LONGEST,
    SHAREGPT_OUTPUTS,
    SHAREGPT_PROMPTS,
)
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.executor import Allocation, Executor, RankDescription
from kvmesh.workers.kv_pool import KVPool
from kvmesh.workers.local import InProcessExecutor
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.request_check import check_request
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageGeometry, PageNeed

FORMATS = ("exact", "int8", "int4", "k4v4", "k4v2", "k2v2")

MakeExecutor = Callable[[EngineConfig], Executor]


@dataclass(frozen=True)
class Request:
    """Number of prompt and output tokens."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Run:
    """One run of one format.

    seconds: CPU time on a CPU, wall time on a GPU; wall_s: always wall time
    saturated_tokens_per_s: output while requests waited; None if none ever did
    max_running, mean_running: sequences per step; preemptions: sequences recomputed
    seats: sequences that may run at once, wanted to fill the memory and granted by the engine,
        which gives at most `max_hot_share` of it to hot pages
    hot_pages, sealed_pages: that sequences can hold
    """

    kv_format: str
    seconds: float
    wall_s: float
    requests_per_s: float
    output_tokens_per_s: float
    saturated_tokens_per_s: float | None
    steps: int
    max_running: int
    mean_running: float
    seats_wanted: int
    seats: int
    preemptions: int
    hot_pages: int
    sealed_pages: int


def mix(count: int, seed: int, longest: int = SHAREGPT_LONGEST, scale: int = 1) -> list[Request]:
    """longest: maximum tokens of a sequence, before everything is divided by scale"""
    random = np.random.default_rng(seed)
    prompts = replace(SHAREGPT_PROMPTS, high=longest // 2).draw(random, count)
    outputs = replace(SHAREGPT_OUTPUTS, high=longest).draw(random, count)
    return [
        Request(-(-int(prompt) // scale), -(-min(int(output), longest - int(prompt)) // scale))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def held_tokens(requests: list[Request]) -> int:
    """Tokens of a running sequence, averaged over time: long outputs run for longer."""
    total = sum(request.output for request in requests)
    return round(sum(r.output * (r.prompt + r.output / 2) for r in requests) / total)


def seats(config: EngineConfig, rank: RankDescription, tokens: int) -> int:
    """Number of sequences of that many tokens that fit the KV memory, including hot pages."""
    geometry = PageGeometry(
        page_size=config.page_size,
        sink_pages=rank.sink_pages,
        recent_pages=rank.recent_pages,
        hot_page_bytes=rank.hot_page_bytes,
        sealed_page_bytes=rank.sealed_page_bytes,
    )
    one = PageNeed(geometry.hot_per_sequence(), geometry.need(tokens).sealed)
    return max(1, round(rank.kv_budget_bytes / geometry.bytes_of(one)))


def run(config: EngineConfig, make_executor: MakeExecutor, requests: list[Request]) -> Run:
    executor = make_executor(config)
    (rank,) = executor.describe()
    step_tokens = config.limits(DEVICE).max_num_batched_tokens
    wanted = min(seats(config, rank, held_tokens(requests)), step_tokens)
    engine = Engine(config.replace(max_num_seqs=wanted), executor)
    random = np.random.default_rng(0)
    for index, request in enumerate(requests):
        ids = random.integers(3, engine.info.vocab_size, request.prompt).astype(np.int32)
        params = SamplingParams(temperature=0.0, max_tokens=request.output, ignore_eos=True)
        asked = EngineRequest(str(index), ids, params)
        check_request(asked, engine.info)
        engine.add(asked)
    running, given = [], 0
    saturated: float | None = None
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    start_s, wall_start_s = clock(), time.perf_counter()
    while engine.has_work:
        deltas = engine.step()
        given += sum(len(delta.token_ids) for delta in deltas)
        running.append(len(engine.scheduler.running) + sum(1 for d in deltas if d.finish_reason))
        if engine.scheduler.waiting:
            saturated = given / (clock() - start_s)
    took_s, wall_s = clock() - start_s, time.perf_counter() - wall_start_s
    engine.check_integrity()
    loads = engine.loads()
    assert given == sum(request.output for request in requests), "tokens are missing"
    return Run(
        kv_format=config.kv_format,
        seconds=took_s,
        wall_s=wall_s,
        requests_per_s=len(requests) / took_s,
        output_tokens_per_s=given / took_s,
        saturated_tokens_per_s=saturated,
        steps=len(running),
        max_running=max(running),
        mean_running=statistics.mean(running),
        seats_wanted=wanted,
        seats=engine.info.max_num_seqs,
        preemptions=loads.preemptions_total,
        hot_pages=engine.info.capacity.hot,
        sealed_pages=engine.info.capacity.sealed,
    )


def summary(rounds: list[list[Run]]) -> list[dict[str, Any]]:
    """For each format, over the rounds; gain: over exact in the same round."""
    rows = []
    for runs in zip(*rounds, strict=True):
        ratios = []
        for one, others in zip(runs, rounds, strict=True):
            exact = [other for other in others if other.kv_format == "exact"]
            ratios += [one.requests_per_s / other.requests_per_s for other in exact]
        middle = sorted(runs, key=lambda one: one.requests_per_s)[len(runs) // 2]
        rows.append(
            {
                **asdict(middle),
                "gain": statistics.median(ratios) if ratios else None,
                "gain_range": [min(ratios), max(ratios)] if ratios else None,
            }
        )
    return rows


def executor_maker(model: str) -> tuple[str, MakeExecutor]:
    """The configuration's `model`, and a factory of executors; weights are made once."""
    if model == "embedded":
        return EMBEDDED_NAME, InProcessExecutor
    device, dtype = torch.device(DEVICE), dtype_on(DEVICE)
    served = random_model(SHAPES[model], dtype, device)
    return model, lambda config: RandomModelExecutor(served, config, dtype=dtype, device=device)


def check_kernels(kv_formats: list[str], shape: ModelShape, page_size: int) -> None:
    """Over a small pool that is filled like the real ones."""
    for name in kv_formats:
        pool = KVPool(
            Allocation(hot_pages=1, sealed_pages=64, max_rows=1, max_pages_per_row=65),
            get_format(name),
            num_layers=1,
            num_kv_heads=shape.kv_heads,
            page_size=page_size,
            head_dim=shape.head_dim,
            dtype=dtype_on(DEVICE),
            device=torch.device(DEVICE),
        )
        fill(pool, get_format(name))
        gate(pool, get_format(name), shape.heads)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, make_executor = executor_maker(options.model)
    requests = mix(options.requests, options.seed, options.longest, options.scale)
    if DEVICE == "cuda" and model in SHAPES:  # CPUs serve with plain torch itself
        check_kernels(options.format, SHAPES[model], options.page_size // options.scale)
    prompts, outputs = [r.prompt for r in requests], [r.output for r in requests]
    report: dict[str, Any] = {
        "conditions": {
            **conditions(),
            "model": model,
            "dtype": str(dtype_on(DEVICE)).removeprefix("torch."),
            "threads": options.threads if DEVICE == "cpu" else None,
            "clock": "processor time" if DEVICE == "cpu" else "wall",
            "load_average": os.getloadavg()[0],
            "requests": len(requests),
            "seed": options.seed,
            "prompt_tokens_mean": statistics.mean(prompts),
            "output_tokens_mean": statistics.mean(outputs),
            "scale": options.scale,
            "longest": options.longest,
            "kv_memory_mb": options.kv_memory_mb / options.scale,
            "page_size": options.page_size // options.scale,
            "max_num_batched_tokens": options.max_num_batched_tokens // options.scale,
            "max_hot_share": options.max_hot_share,
            "cuda_graphs": DEVICE == "cuda",
        },
        "rows": [],
    }
    print(report["conditions"])
    rounds: list[list[Run]] = []
    for _ in range(options.rounds):
        runs = []
        for kv_format in options.format:
            config = EngineConfig(
                model=model,
                kv_format=kv_format,
                page_size=options.page_size // options.scale,
                kv_memory_bytes=int(options.kv_memory_mb * 2**20) // options.scale,
                max_num_seqs=1,
                max_hot_share=options.max_hot_share,
                max_num_batched_tokens=options.max_num_batched_tokens // options.scale,
                max_model_len=options.longest,
                prefix_cache=False,
                threads_per_rank=options.threads,
                cuda_graphs=DEVICE == "cuda",
                kv_probe="off",
            )
            runs.append(run(config, make_executor, requests))
            one = runs[-1]
            print(
                f"{kv_format:8} {one.requests_per_s:8.3f} requests/s {one.output_tokens_per_s:9.1f}"
                f" tokens/s, {one.mean_running:.1f} running (at most {one.max_running} of"
                f" {one.seats} seats, {one.seats_wanted} wanted), {one.preemptions} preemptions,"
                f" {one.seconds:.0f} s",
                flush=True,
            )
            free_bytes()  # releases the pool before the next one is made
        rounds.append(runs)
        report["rounds"] = len(rounds)
        report["rows"] = summary(rounds)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("embedded", *SHAPES), default="embedded")
    parser.add_argument("--format", nargs="+", default=list(FORMATS))
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--kv-memory-mb", type=float, default=160)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument(
        "--longest", type=int, default=SHAREGPT_LONGEST, help="maximum tokens of a sequence"
    )
    parser.add_argument("--scale", type=int, default=1, choices=(1, 2, 4))
    batched = 2048 if DEVICE == "cuda" else 256
    parser.add_argument("--max-num-batched-tokens", type=int, default=batched)
    parser.add_argument("--max-hot-share", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--json", type=Path)
    report = measure(parser.parse_args(arguments))
    print(f"\n{'format':8} {'requests/s':>10} {'gain':>6}")
    for row in report["rows"]:
        gain = "–" if row["gain"] is None else f"{row['gain']:.2f}"
        print(f"{row['kv_format']:8} {row['requests_per_s']:10.3f} {gain:>6}")
    return report


if __name__ == "__main__":
    main()
