"""The engine compared with transformers, in one run.

    python -m benchmarks.engine [--tokens N] [--rounds R] [--json FILE]

Three measurements on the embedded model, greedy. The comparison uses fp32 with exact KV (the
same numbers are computed); the other KV formats are measured as well:

  single   one stream's decode: tokens per second after the first token, compared with
           transformers' `generate`
  batch    16 requests at once, of different lengths: tokens per second, compared with
           transformers' `generate` on the padded batch, and with its own continuous
           batching, `generate_batch`
  host     host time of a decode step before the model runs, at 1k and 8k tokens
           of context

The two sides of a comparison alternate, and the figure is the median of the rounds'
ratios: if the machine slows down, it slows down both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import local_executor
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams

console = Console(stderr=True)


def prompt_of(length: int, seed: int) -> list[int]:
    """Random ordinary tokens, since the content does not affect the work."""
    return [int(i) for i in np.random.default_rng(seed).integers(100, 40_000, length)]


def make_engine(kv_format: str, max_num_seqs: int = 16, threads: int | None = None) -> Engine:
    config = EngineConfig(
        model=EMBEDDED_NAME,
        kv_format=kv_format,
        kv_memory_bytes=3 << 30,
        max_num_seqs=max_num_seqs,
        prefix_cache=False,
        kv_probe="off",
        threads_per_rank=threads,
    )
    return Engine(config, local_executor(config))


def run_engine(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[float, float, float]:
    """Seconds to the first token, from there to the last, and median host seconds per step."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    start_s = time.perf_counter()
    for index, prompt in enumerate(prompts):
        ids = np.array(prompt, np.int32)
        engine.add(EngineRequest(str(index), ids, params))
    first = 0.0
    host = []
    while engine.has_work:
        deltas = engine.step()
        host.append(engine.stats.rank_host_s)
        if deltas and not first:
            first = time.perf_counter()
    ended = time.perf_counter()
    return first - start_s, ended - first, statistics.median(host)


class _FirstToken(BaseStreamer):  # type: ignore[misc]
    """Records when generate's first new token arrives (its first put is the prompt)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: there is nothing to flush."""


def run_generate(model: PreTrainedModel, prompt: list[int], tokens: int) -> float:
    """Seconds from the first token to the last."""
    streamer = _FirstToken()
    ids = torch.tensor([prompt])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_greedy(tokens),
        streamer=streamer,
    )
    return streamer.times[-1] - streamer.times[1]


def run_padded(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> float:
    """Seconds for all requests in one call of `generate`, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    start_s = time.perf_counter()
    found = model.generate(ids, attention_mask=mask, generation_config=_greedy(tokens))
    ended = time.perf_counter()
    assert found.shape == (len(prompts), longest + tokens)
    return ended - start_s


def run_generate_batch(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> float:
    """Seconds for all requests."""
    start_s = time.perf_counter()
    results = model.generate_batch(prompts, generation_config=_greedy(tokens))
    ended = time.perf_counter()
    assert len(results) == len(prompts)
    assert all(len(r.generated_tokens) == tokens for r in results.values())
    return ended - start_s


def _greedy(tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def ratios(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> dict[str, float]:
    """Rates of both, alternating, and the median of theirs/ours in time (> 1: we are faster)."""
    ours(), theirs()  # warm up
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "ratio_min": min(b / a for a, b in pairs),
        "ratio_max": max(b / a for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(EMBEDDED_NAME, progress=None).path, dtype=torch.float32
    )
    results: dict[str, Any] = {"device": "cpu", "threads": threads, "dtype": "float32"}
    results["single"] = measure_single(model, args.tokens, args.rounds)
    results["batch"] = measure_batch(model, args.tokens, args.rounds)
    results["host"] = measure_host()
    show(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def measure_single(model: PreTrainedModel, tokens: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for kv_format in ("exact", "int8"):
        engine = make_engine(kv_format)
        for context in (512, 2048):
            console.log(f"single stream, {kv_format}, {context} tokens of prompt")
            prompt = prompt_of(context, 0)
            figures = ratios(
                lambda e=engine, p=prompt: run_engine(e, [p], tokens)[1],  # type: ignore[misc]
                lambda p=prompt: run_generate(model, p, tokens),  # type: ignore[misc]
                rounds,
            )
            rows.append({"kv_format": kv_format, "context": context, **figures})
            rows[-1]["ours_tokens_per_s"] = (tokens - 1) / figures["ours_s"]
            rows[-1]["theirs_tokens_per_s"] = (tokens - 1) / figures["theirs_s"]
    return rows


def measure_batch(model: PreTrainedModel, tokens: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    prompts = [prompt_of(64 + 24 * i, i) for i in range(16)]
    baselines = {"generate": run_padded, "generate_batch": run_generate_batch}
    for kv_format, theirs in itertools.product(("exact", "int8"), baselines):
        console.log(f"16 requests, {kv_format}, {theirs}")
        engine = make_engine(kv_format)
        figures = ratios(
            lambda e=engine: sum(run_engine(e, prompts, tokens)[:2]),  # type: ignore[misc]
            lambda run=baselines[theirs]: run(model, prompts, tokens),  # type: ignore[misc]
            max(1, rounds // 2),
        )
        rows.append({"kv_format": kv_format, "requests": 16, "theirs": theirs, **figures})
        rows[-1]["ours_tokens_per_s"] = 16 * tokens / figures["ours_s"]
        rows[-1]["theirs_tokens_per_s"] = 16 * tokens / figures["theirs_s"]
    return rows


def measure_host() -> list[dict[str, Any]]:
    engine = make_engine("int8", max_num_seqs=1)
    rows = []
    for context in (1000, 8000):
        console.log(f"host time of a step at {context} tokens of context")
        host = run_engine(engine, [prompt_of(context, 0)], 64)[2]
        rows.append({"context": context, "host_us": host * 1e6})
    return rows


def show(results: dict[str, Any]) -> None:
    out = Console()
    table = Table(title="tokens per second on the CPU, fp32, and the ratio to transformers")
    for column in ("measurement", "KV", "kvmesh", "transformers", "ratio", "min … max"):
        table.add_column(column, justify="left" if column in ("measurement", "KV") else "right")
    for kind in ("single", "batch"):
        for row in results[kind]:
            single = kind == "single"
            what = f"decode at {row['context']}" if single else f"16 requests, {row['theirs']}"
            table.add_row(
                what,
                row["kv_format"],
                f"{row['ours_tokens_per_s']:.1f}",
                f"{row['theirs_tokens_per_s']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_min']:.2f} … {row['ratio_max']:.2f}",
            )
    out.print(table)
    host = ", ".join(f"{r['host_us']:.0f} µs at {r['context']}" for r in results["host"])
    out.print(f"host time of a decode step, median: {host} tokens of context")


if __name__ == "__main__":
    main()
