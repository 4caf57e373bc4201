"""Decode attention on a GPU: share of memory bandwidth by shape and KV format.

    python benchmarks/attention.py [--output FILE] [--format NAME ...] [--heads 8x4 ...]
        [--head-dim N ...] [--batch N ...] [--context N ...] [--tune]

Needs only torch and triton, and runs from a checkout. For each shape the output is
first compared with attention in fp64 over the decoded pages, by FlashAttention's rule;
a case that fails is not timed and the run fails. Then, over pools larger than the caches:

    bytes      what had to be read: sealed and hot pages of every sequence, once
    GB/s       bytes over the median time of one call
    share      of the bandwidth of a large device copy in the same run
    speed-up   the time of the fastest bf16 baseline divided by ours

Baselines (`baselines.py`) are torch SDPA on contiguous bf16 keys and values, and
FlashInfer's paged decode over bf16 and fp8 if it is installed. Shapes that do not fit
the GPU's memory are skipped with a message. Clocks are not locked. Formats that differ
from another one only in sealing are not measured separately.

Without a GPU, `--dry-run` runs one tiny shape in Triton's interpreter: correctness is
checked, but the printed times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import triton

from benchmarks.baselines import Baselines, Shape, measure_baselines
from benchmarks.device import (
    DEVICE,
    ROUNDS,
    clocks,
    conditions,
    copy_bandwidth,
    free_bytes,
    seconds,
)
from benchmarks.kernel_formats import FORMATS
from benchmarks.stand_in_params import params_for
from kvmesh.kernels.attention import AttentionBatch, paged_attention, triton_attention
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_launch import (
    Launch,
    decode_launch,
    takes_integer_path,
)
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.seal import seal_pages

PAGE_SIZE = 64
# The interpreter truncates to bf16 instead of rounding.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else None
CONTENT_PAGES = 256
HEADS = ("8x4", "8x8", "32x1")  # KV heads x query heads per KV head
HEAD_DIMS = (128, 64)
BATCHES = (1, 8, 64)
CONTEXTS = (4096, 32768, 131072, 1048576)
TINY = Shape(2, 200, 2, 3, 64)


@dataclass(frozen=True)
class Row:
    """path: "integer", "one warp" or "plain", with how it was compiled
    error, error_allowed: maximum error of the output against fp64, and twice same-dtype torch's
    bf16_us: the fastest bf16 baseline; sdpa_us, flashinfer_us, flashinfer_fp8_us: each baseline
    clocks: right after the measurement
    """

    shape: Shape
    kv_format: str
    path: str
    options: dict[str, int]
    error: float
    error_allowed: float
    bytes: int
    time_us: float
    gb_per_s: float
    share: float
    sdpa_us: float | None
    flashinfer_us: float | None
    flashinfer_fp8_us: float | None
    speed_up: float | None
    clocks: str


def shapes(
    heads: Iterable[str], head_dims: Iterable[int], batches: Iterable[int], contexts: Iterable[int]
) -> Iterator[Shape]:
    """The grid of shapes; a million tokens only with a batch of one."""
    for head_dim in head_dims:
        for kv_heads, group in (map(int, pair.split("x")) for pair in heads):
            for batch in batches:
                for context in contexts:
                    if context < 2**20 or batch == 1:
                        yield Shape(batch, context, kv_heads, group, head_dim)


class Case:
    """A pool full of shuffled pages of random numbers, and one decode step over it."""

    def __init__(self, fmt: KVFormat, shape: Shape) -> None:
        self.fmt = fmt
        self.shape = shape
        pages = -(-shape.context // PAGE_SIZE)
        total = pages * shape.batch
        # The last page of each sequence is hot, all others are sealed.
        self.hot = torch.randn(
            shape.batch, 2, shape.kv_heads, PAGE_SIZE, shape.head_dim, device=DEVICE
        ).to(DTYPE)
        page_bytes = fmt.page_bytes(PAGE_SIZE, shape.head_dim, DTYPE.itemsize)
        self.sealed = torch.empty(
            total, shape.kv_heads, page_bytes, dtype=torch.uint8, device=DEVICE
        )
        # A few content pages are repeated: the same bytes are read, but sealing is fast.
        count = min(total, CONTENT_PAGES)
        content = torch.randn(
            count, 2, shape.kv_heads, PAGE_SIZE, shape.head_dim, device=DEVICE
        ).to(DTYPE)
        ids = torch.arange(count, dtype=torch.int32, device=DEVICE)
        self.params = params_for(fmt, shape.kv_heads, shape.head_dim).to(DEVICE)
        seal_pages(
            content,
            self.sealed,
            ids,
            ids,
            fmt=fmt,
            params=self.params,
            positions=ids.long() * PAGE_SIZE,
            backend="triton",
        )
        for start in range(count, total, count):
            self.sealed[start : start + count] = self.sealed[: min(count, total - start)]
        table = torch.randperm(total, device=DEVICE).int().view(shape.batch, pages)
        hot_table = torch.full_like(table, -1)
        hot_table[:, -1] = torch.arange(shape.batch, device=DEVICE)
        self.q = torch.randn(
            shape.batch, shape.kv_heads * shape.group, shape.head_dim, device=DEVICE
        ).to(DTYPE)
        self.batch = AttentionBatch(
            query_starts=torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE),
            seq_lens=torch.full((shape.batch,), shape.context, dtype=torch.int32, device=DEVICE),
            rows=torch.arange(shape.batch, dtype=torch.int32, device=DEVICE),
            hot_tables=hot_table,
            sealed_tables=table,
            page_size=PAGE_SIZE,
            sink_pages=0,
            recent_pages=0,
            max_query_len=1,
            max_seq_len=shape.context,
        )
        hot_bytes = self.hot.numel() * DTYPE.itemsize
        self.bytes = (pages - 1) * shape.batch * shape.kv_heads * page_bytes + hot_bytes

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.shape.head_dim**-0.5
        return paged_attention(
            self.q,
            self.hot,
            self.sealed,
            self.batch,
            fmt=self.fmt,
            scale=scale,
            params=self.params,
            backend="triton",
        )

    def errors(self) -> tuple[float, float]:
        """For the first and the last sequence: our error, and twice that of torch in bf16."""
        out, _ = self.attend()
        ours, allowed = 0.0, 0.0
        for seq in {0, self.shape.batch - 1}:
            for head in range(self.shape.kv_heads):
                group = slice(head * self.shape.group, (head + 1) * self.shape.group)
                q, (k, v) = self.q[seq, group], self._decoded(seq, head)
                want = _naive(q, k, v, torch.float64)
                same = _naive(q, k, v, torch.bfloat16)
                ours = max(ours, float((out[seq, group].double() - want).abs().max()))
                allowed = max(allowed, 2 * float((same.double() - want).abs().max()))
        return ours, allowed + 1e-4

    def _decoded(self, seq: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, head_dim] fp32 each, decoded from the pages of one sequence and KV head."""
        stored = DTYPE if self.fmt.name == "exact" else torch.float32
        params = self.params.share(self.fmt, head, self.shape.kv_heads)
        parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        # A decoded number takes many times the memory of a sealed one.
        for ids in self.batch.sealed_tables[seq, :-1].long().split(1024):
            pages = self.sealed[ids, head : head + 1]
            decoded = self.fmt.decode(pages, PAGE_SIZE, self.shape.head_dim, stored, params)
            for part, x in zip(parts, decoded, strict=True):
                part.append(x.float().flatten(0, 2))
        for index, part in enumerate(parts):
            part.append(self.hot[seq, index, head].float())
        k, v = (torch.cat(part)[: self.shape.context] for part in parts)
        return k, v


def case_bytes(fmt: KVFormat, shape: Shape) -> int:
    """The memory of a case: its pool, and the maximum that checking it needs in addition."""
    pages = -(-shape.context // PAGE_SIZE) * shape.batch
    page_bytes = fmt.page_bytes(PAGE_SIZE, shape.head_dim, DTYPE.itemsize)
    one_head = shape.context * shape.head_dim
    return pages * shape.kv_heads * page_bytes + 64 * one_head + 2**30


def _naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Attention of one query [heads, head_dim] over one KV head's keys and values, in `dtype`."""
    scores = q.to(dtype) @ k.to(dtype).T
    weights = torch.softmax(scores * q.shape[-1] ** -0.5, dim=-1)
    return weights @ v.to(dtype)


def launch_of(fmt: KVFormat, shape: Shape) -> tuple[str, Launch]:
    """The path that decode takes, and how it is compiled."""
    geometry = Geometry(shape.kv_heads, shape.group, shape.head_dim, PAGE_SIZE)
    integer = takes_integer_path(fmt, geometry, CAPABILITY)
    launch = decode_launch(fmt, geometry, CAPABILITY, integer=integer)
    if integer:
        return "integer", launch
    return "plain" if launch.options["num_warps"] > 1 else "one warp", launch


def measure(
    fmt: KVFormat,
    shape: Shape,
    bandwidth: float,
    baselines: Baselines | None,
    rounds: int = ROUNDS,
) -> Row | None:
    """None if the case does not fit the device; ends the run if its output is wrong."""
    needed, free = case_bytes(fmt, shape), free_bytes()
    if free is not None and needed > free:
        print(f"{fmt.name} {shape}: {needed:,} bytes do not fit {free:,}", file=sys.stderr)
        return None
    case = Case(fmt, shape)
    error, allowed = case.errors()
    if not error <= allowed:
        raise SystemExit(f"{fmt.name} {shape}: error {error:.2e}, allowed {allowed:.2e}")
    time_s = seconds(case.attend, rounds)
    now = clocks()
    path, launch = launch_of(fmt, shape)
    others = baselines or Baselines(None, None, None, {})
    return Row(
        shape=shape,
        kv_format=fmt.name,
        path=path,
        options=launch.options,
        error=error,
        error_allowed=allowed,
        bytes=case.bytes,
        time_us=round(time_s * 1e6, 1),
        gb_per_s=round(case.bytes / time_s / 1e9, 1),
        share=round(case.bytes / time_s / bandwidth, 3),
        sdpa_us=_us(others.sdpa_s),
        flashinfer_us=_us(others.flashinfer_s),
        flashinfer_fp8_us=_us(others.flashinfer_fp8_s),
        speed_up=round(others.bf16_s / time_s, 2) if others.bf16_s else None,
        clocks=now,
    )


def _us(time_s: float | None) -> float | None:
    return None if time_s is None else round(time_s * 1e6, 1)


COLUMNS = (
    f"{'format':9} {'shape':24} {'path':8} {'time us':>9} {'GB/s':>7} {'share':>6} {'x bf16':>7}"
    f" {'SDPA':>9} {'FlashInfer':>10} {'its fp8':>9}  error"
)


def show(row: Row) -> None:
    s = row.shape

    def number(value: float | None, width: int, digits: int = 1) -> str:
        return f"{'–':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    where = f"b{s.batch} {s.context} {s.kv_heads}x{s.group} d{s.head_dim}"
    print(
        f"{row.kv_format:9} {where:24} {row.path:8} {row.time_us:>9.1f} {row.gb_per_s:>7.1f}"
        f" {row.share:>6.1%} {number(row.speed_up, 7, 2)} {number(row.sdpa_us, 9)}"
        f" {number(row.flashinfer_us, 10)} {number(row.flashinfer_fp8_us, 9)}"
        f"  {row.error:.1e}",
        flush=True,
    )


def tune(names: list[str], bandwidth: float) -> list[Row]:
    """Try warps and stages, or stages and registers, at one long shape."""
    shape = Shape(8, 131072, 8, 8, 128)
    rows = []
    for name in names:
        fmt = get_format(name)
        path, launch = launch_of(fmt, shape)
        if path != "plain":
            tried = [
                {"num_warps": 1, "num_stages": stages, **registers}
                for stages in (2, 3, 4, 5)
                for registers in ({}, {"maxnreg": 168}, {"maxnreg": 208})
            ]
        else:
            tried = [
                {"num_warps": warps, "num_stages": stages}
                for warps in (1, 2, 4, 8)
                for stages in (2, 3, 4)
            ]
        attribute = "decode_launch"
        chosen = getattr(triton_attention, attribute)
        for options in tried:
            other = replace(launch, options=options)
            setattr(triton_attention, attribute, lambda *_, other=other, **__: other)
            try:
                row = measure(fmt, shape, bandwidth, None, rounds=5)
                if row is not None:
                    rows.append(row)
                    print(options, end="  ")
                    show(row)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{name} {options}: {error}", file=sys.stderr)
            finally:
                setattr(triton_attention, attribute, chosen)
    return rows


def run(grid: Iterable[Shape], formats: list[str], output: Path | None, tuning: bool) -> list[Row]:
    """Measure and print; writes after every shape, so that results survive a later failure."""
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {
        "conditions": {
            **conditions(),
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
            "page_size": PAGE_SIZE,
            "dtype": str(DTYPE).removeprefix("torch."),
        },
        "baselines": [],
        "rows": [],
    }
    print(report["conditions"])
    rows = tune(formats, bandwidth) if tuning else []
    print(COLUMNS)
    for shape in grid:
        baselines = measure_baselines(shape)
        report["baselines"].append({"shape": asdict(shape), "fastest": baselines.fastest})
        for name in formats:
            row = measure(get_format(name), shape, bandwidth, baselines)
            if row is not None:
                rows.append(row)
                show(row)
        if output:
            report["rows"] = [asdict(row) for row in rows]
            output.write_text(json.dumps(report, indent=1) + "\n")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tune", action="store_true", help="also try ways to compile the kernels")
    parser.add_argument("--dry-run", action="store_true", help="one tiny shape, also without a GPU")
    parser.add_argument("--format", nargs="+", default=list(FORMATS))
    parser.add_argument("--heads", nargs="+", default=HEADS, help="KV heads x queries per KV head")
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--context", nargs="+", type=int, default=CONTEXTS)
    options = parser.parse_args(arguments)
    if DEVICE == "cpu" and not options.dry_run:
        raise SystemExit(
            "this benchmark needs a CUDA GPU; without one use --dry-run, or benchmarks/sass.py"
        )
    grid: Iterable[Shape] = [TINY]
    if not options.dry_run:
        grid = shapes(options.heads, options.head_dim, options.batch, options.context)
    run(grid, options.format, options.output, options.tune)


if __name__ == "__main__":
    main()
