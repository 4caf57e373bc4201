"""Time per output token of the engine's data plane, by context, batch and KV format.

    python benchmarks/decode.py [--shape llama-3-8b] [--context N ...] [--batch N ...]
        [--format F ...] [--graphs both|on|off] [--steps N] [--output FILE]

Needs torch, triton, transformers and msgspec, no Ray, no model file: weights of the shape are
random and generated on the device. What is timed is `ModelRunner.execute`, which is what an
engine's rank does in a step: the plan's arrays, the model, writing, sealing and attention over
a pool filled with random pages, and the greedy choice, whose tokens go into the next step.
Scheduling and the network are not included.

    ms         median over the steps, and mean, which includes all sealing
    share      of a large copy's bandwidth in the same run: (weights + KV bytes read) / time
    x exact    the time with `exact` divided by this time, at the same context, batch and graphs

Before a format is timed, the attention kernels are compared with plain torch over pages of a
pool filled in the same way, and the run ends if they differ.

Pools that do not fit the device's memory are skipped with a message, together with the ratios
to them. `--shape tiny` runs anywhere in seconds, but its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from benchmarks.decode_steps import DecodeSteps, fill
from benchmarks.device import DEVICE, clocks, conditions, copy_bandwidth, free_bytes
from benchmarks.gate import gate
from benchmarks.random_model import (
    SHAPES,
    ModelShape,
    RandomModelExecutor,
    dtype_on,
    random_model,
)
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.model.load import ServedModel
from kvmesh.workers.sizes import PageGeometry

FORMATS = ("exact", "int8", "fp8", "k8v4", "int4", "k4v4", "k4v2", "k3v2", "k2v2")
CONTEXTS = {"llama-3-8b": (32768, 131072, 524288, 1048576), "tiny": (256, 1024)}
BATCHES = (1, 8)
PAGE_SIZE = 64
WARM_UP = 8
# Memory besides weights and pool: activations, attention's parts, graphs, content pages.
MARGIN_BYTES = 3 * 2**30


@dataclass(frozen=True)
class Row:
    """host_ms: of a step, before the model runs; kv_bytes: read by the last step; sealed_pages:
    in the measured steps; share and x_exact: see the module's docstring"""

    kv_format: str
    context: int
    batch: int
    cuda_graphs: bool
    ms: float
    mean_ms: float
    host_ms: float
    tokens_per_s: float
    weight_bytes: int
    kv_bytes: int
    sealed_pages: int
    share: float
    x_exact: float | None
    clocks: str


@dataclass(frozen=True)
class Device:
    """What all measurements of a run share."""

    shape: ModelShape
    model: ServedModel
    dtype: torch.dtype
    bandwidth: float
    steps: int
    gated: set[str] = field(default_factory=set)

    def measure(
        self, kv_format: str, context: int, batch: int, cuda_graphs: bool, exact_ms: float | None
    ) -> Row | None:
        """None if the pool does not fit."""
        config = EngineConfig(
            model=self.shape.name,
            kv_format=kv_format,
            page_size=PAGE_SIZE,
            kv_memory_bytes=1,
            cuda_graphs=cuda_graphs,
            kv_probe="off",
        )
        executor = RandomModelExecutor(
            self.model, config, dtype=self.dtype, device=torch.device(DEVICE)
        )
        (rank,) = executor.describe()
        geometry = PageGeometry(
            page_size=PAGE_SIZE,
            sink_pages=rank.sink_pages,
            recent_pages=rank.recent_pages,
            hot_page_bytes=rank.hot_page_bytes,
            sealed_page_bytes=rank.sealed_page_bytes,
        )
        needed = DecodeSteps.pool_bytes(geometry, batch=batch, context=context) + MARGIN_BYTES
        free = free_bytes()
        if free is not None and needed > free:
            print(
                f"{kv_format:6} {context:>8} x{batch}: needs {needed / 2**30:.1f} GiB with its"
                f" margin, only {free / 2**30:.1f} are free: skipped",
                flush=True,
            )
            return None
        steps = DecodeSteps(geometry, batch=batch, context=context, steps=WARM_UP + self.steps)
        executor.allocate(steps.allocation)
        fill(executor.runner.pool, get_format(kv_format))
        if kv_format not in self.gated:
            gate(executor.runner.pool, get_format(kv_format), self.shape.heads)
            self.gated.add(kv_format)
        return self._timed(executor, steps, config, context, batch, exact_ms)

    def _timed(
        self,
        executor: RandomModelExecutor,
        steps: DecodeSteps,
        config: EngineConfig,
        context: int,
        batch: int,
        exact_ms: float | None,
    ) -> Row:
        """As the engine does it: where ranks run ahead, a step is submitted before the tokens of
        the one before are read, and takes the time from its result to the next."""
        ahead = executor.max_in_flight > 1
        count = WARM_UP + self.steps
        times, hosts, seals, kv_bytes = [], [], [], []

        def submit(tokens: list[int] | None) -> float:
            """Returns the time before."""
            kv_bytes.append(steps.kv_bytes)
            plan = steps.plan(tokens)
            seals.append(len(plan.seal_hot))
            start_s = time.perf_counter()
            executor.submit(plan)
            return start_s

        start_s = submit(list(range(3, 3 + batch)))
        for number in range(1, count + 1):
            if ahead and number < count:
                submit(None)
            result = executor.result()  # with the tokens on the host
            end_s = time.perf_counter()
            times.append(end_s - start_s)
            hosts.append(result.host_s)
            start_s = end_s
            if not ahead and number < count:
                start_s = submit([token.token_id for token in result.tokens])
        times, hosts = times[WARM_UP:], hosts[WARM_UP:]
        now = clocks()
        median_s = statistics.median(times)
        weight_bytes = self.shape.params_read * self.dtype.itemsize
        return Row(
            kv_format=config.kv_format,
            context=context,
            batch=batch,
            cuda_graphs=config.limits(DEVICE).cuda_graphs,
            ms=median_s * 1e3,
            mean_ms=statistics.mean(times) * 1e3,
            host_ms=statistics.median(hosts) * 1e3,
            tokens_per_s=batch / median_s,
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes[-1],
            sealed_pages=sum(seals[WARM_UP:]),
            share=(weight_bytes + kv_bytes[-1]) / median_s / self.bandwidth,
            x_exact=exact_ms / (median_s * 1e3) if exact_ms else None,
            clocks=now,
        )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; writes after every row, so that results survive a later failure."""
    shape = SHAPES[options.shape]
    dtype = dtype_on(DEVICE)
    bandwidth = copy_bandwidth()
    torch.manual_seed(0)
    model = random_model(shape, dtype, torch.device(DEVICE))
    device = Device(shape, model, dtype, bandwidth, options.steps)
    report: dict[str, Any] = {
        "conditions": {
            **conditions(),
            "shape": asdict(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "page_size": PAGE_SIZE,
            "steps": options.steps,
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
        },
        "rows": [],
    }
    print(report["conditions"])
    print(
        f"{'format':6} {'context':>8} {'batch':>5} {'graphs':>6} {'ms':>9} {'mean':>9}"
        f" {'tokens/s':>9} {'host ms':>8} {'share':>6} {'x exact':>8}"
    )
    graphs = {"both": (True, False), "on": (True,), "off": (False,)}[options.graphs]
    for context in options.context or CONTEXTS[options.shape]:
        for batch in options.batch:
            for cuda_graphs in graphs if DEVICE == "cuda" else (False,):
                exact_ms: float | None = None
                for kv_format in options.format:
                    row = device.measure(kv_format, context, batch, cuda_graphs, exact_ms)
                    if row is None:
                        continue
                    if kv_format == "exact":
                        exact_ms = row.ms
                    report["rows"].append(asdict(row))
                    show(row)
                    if options.output:
                        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def show(row: Row) -> None:
    ratio = "–" if row.x_exact is None else f"{row.x_exact:.2f}"
    print(
        f"{row.kv_format:6} {row.context:>8} {row.batch:>5} {'yes' if row.cuda_graphs else 'no':>6}"
        f" {row.ms:>9.3f} {row.mean_ms:>9.3f} {row.tokens_per_s:>9.1f} {row.host_ms:>8.3f}"
        f" {row.share:>6.1%} {ratio:>8}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--context", nargs="+", type=int)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--format", nargs="+", default=FORMATS, help="exact first, for the ratios")
    parser.add_argument("--graphs", choices=("both", "on", "off"), default="both")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if DEVICE == "cpu" and options.shape != "tiny":
        raise SystemExit("this benchmark needs a CUDA GPU; without one use --shape tiny")
    return run(options)


if __name__ == "__main__":
    main()
