"""What runs first where there is a GPU: is it right, and how near is it to what the device allows?

    python -m benchmarks.first_gpu --output FILE [--only SECTION ...] [--dry-run]

In this order, in about ten minutes on an H100; torch, triton and transformers are enough:

    correct    every served format's decode and prefill kernels against plain torch in fp64; far
               keys; latents; bits that must not depend on a batch; weights in few bits
    host       what a layer's attention costs the host, in the first layer of a step and in others
    ceilings   a large copy's bandwidth, and a large bf16 product's FLOPs
    weights    products with weights in few bits: share of the bandwidth, times the library's time
    decode     attention's share of the bandwidth by batch and context; SDPA and FlashInfer
    prefill    attention's share of the product's FLOPs, for a chunk after a prefix
    step       time per output token of a Llama-3-8B with random weights, with CUDA graphs
    requests   requests per second at a ShareGPT-like mix, by format
    sums       of ranks, one-shot and NCCL's: whether they agree, and how long each takes; with
               several GPUs

A section that FILE has from the same device is not run again: delete it there to repeat it. A
section that is wrong ends the run, so that nothing is timed that is not right. `--dry-run` runs
everything at tiny shapes on any machine; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from benchmarks import attention, decode, sums, throughput
from benchmarks.baselines import Shape, measure_baselines
from benchmarks.device import DEVICE, conditions, copy_bandwidth, seconds
from benchmarks.random_model import KINDS, SHAPES, dtype_on, random_grouped, random_model
from kvmesh.kernels.attention import AttentionBatch, far_attention, paged_attention
from kvmesh.kernels.formats.registry import format_of_model, get_format
from kvmesh.kernels.linear import Kind, fixed_linear, grouped_linear
from kvmesh.kernels.moe import expert_mlp
from kvmesh.kernels.seal import seal_pages

SERVED = ("exact", "int8", "int4", "k8v4", "k4v4", "k4v2", "k3v2", "k2v2", "fp8")
LATENT_FORMATS = ("exact", "int8", "int4", "fp8")
PAGE_SIZE = attention.PAGE_SIZE
Rows = list[dict[str, Any]]


class ChunkCase:
    """A chunk of new tokens after a prefix, over pages that repeat a few random ones."""

    def __init__(self, kv_format: str, shape: Shape, chunk: int, latent_values: int = 0) -> None:
        """latent_values: as in `format_of_model`"""
        fmt = self.fmt = format_of_model(get_format(kv_format), latent_values)
        self.shape, self.chunk = shape, chunk
        pages = -(-(shape.context + chunk) // PAGE_SIZE)
        count = min(pages, 16)
        content = (count, fmt.stored_sides, shape.kv_heads, PAGE_SIZE, shape.head_dim)
        self.hot = torch.randn(content, device=DEVICE).to(attention.DTYPE)
        page_bytes = fmt.page_bytes(PAGE_SIZE, shape.head_dim, attention.DTYPE.itemsize)
        self.sealed = torch.zeros(
            count, shape.kv_heads, page_bytes, dtype=torch.uint8, device=DEVICE
        )
        ids = torch.arange(count, dtype=torch.int32, device=DEVICE)
        seal_pages(self.hot, self.sealed, ids, ids, fmt=fmt, backend="triton")
        table = (torch.arange(pages, device=DEVICE) % count).int()[None, :]
        self.q = torch.randn(chunk, shape.kv_heads * shape.group, shape.head_dim, device=DEVICE).to(
            attention.DTYPE
        )
        length = shape.context + chunk
        self.batch = AttentionBatch(
            query_starts=torch.tensor([0, chunk], dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor([length], dtype=torch.int32, device=DEVICE),
            rows=torch.zeros(1, dtype=torch.int32, device=DEVICE),
            hot_tables=table,
            sealed_tables=table,
            page_size=PAGE_SIZE,
            sink_pages=1,
            recent_pages=1,
            max_query_len=chunk,
            max_seq_len=length,
        )

    def attend(self, backend: str = "triton") -> torch.Tensor:
        scale = self.shape.head_dim**-0.5
        pages = (self.q, self.hot, self.sealed, self.batch)
        return paged_attention(*pages, fmt=self.fmt, scale=scale, backend=backend)[0]

    @property
    def flops(self) -> float:
        """Two products; half of the chunk's own keys are masked."""
        keys = self.shape.context + self.chunk / 2
        return 4.0 * self.chunk * keys * self.q.shape[1] * self.shape.head_dim


def correct(tiny: bool) -> Rows:
    rows: Rows = []
    formats = ("int8",) if tiny else SERVED
    shape = attention.TINY if tiny else Shape(2, 4200, 8, 4, 128)
    for name in formats:
        error, allowed = attention.Case(get_format(name), shape).errors()
        rows.append({"kernel": "decode", "format": name, "error": error, "allowed": allowed})
        case = ChunkCase(name, Shape(1, 130 if tiny else 9000, 1, 2, 64 if tiny else 128), 70)
        want = case.attend("reference").double()
        error = float((case.attend().double() - want).abs().max())
        allowed = 2e-3 if tiny else 2e-2
        rows.append({"kernel": "prefill", "format": name, "error": error, "allowed": allowed})
        rows.append(far_keys(name, tiny))
    rows += [latents(name, tiny) for name in (("int8",) if tiny else LATENT_FORMATS)]
    rows += [fixed_linears(tiny), fixed_experts(tiny)]
    rows += [grouped_linears(kind, count, tiny) for kind in KINDS for count in (1, 16, 200, 2048)]
    rows += [grouped_experts(kind, tiny) for kind in KINDS]
    wrong = [row for row in rows if not row["error"] <= row["allowed"]]
    if wrong:
        raise SystemExit(f"wrong results: {wrong}")
    return rows


def far_keys(name: str, tiny: bool) -> dict[str, Any]:
    """A large chunk as it is served, against the kernels alone, which attend to all keys of a
    deterministic batch."""
    shape = Shape(1, 300 if tiny else 70000, 1 if tiny else 8, 4, 64 if tiny else 128)
    case = ChunkCase(name, shape, 8 if tiny else 8192)
    served = case.attend().double()
    case.batch = replace(case.batch, deterministic=True)
    error = float((served - case.attend().double()).abs().max())
    found = far_attention(torch.device(DEVICE), attention.DTYPE, shape.group, shape.head_dim)
    return {
        "kernel": f"far keys, {found}",
        "format": name,
        "error": error,
        "allowed": 2e-3 if tiny else 2e-2,
    }


def latents(name: str, tiny: bool) -> dict[str, Any]:
    """Of one token, in parts that are merged, and of a chunk; DeepSeek's channels."""
    values, shape = 512, Shape(1, 9000, 1, 16, 576)
    if tiny:
        values, shape = 32, Shape(1, 130, 1, 2, 48)
    errors = []
    for chunk in (1, 70):
        case = ChunkCase(name, shape, chunk, values)
        want = case.attend("reference").double()
        errors.append(float((case.attend().double() - want).abs().max()))
    allowed = 2e-3 if tiny else 2e-2
    return {"kernel": "latents", "format": name, "error": max(errors), "allowed": allowed}


def fixed_experts(tiny: bool) -> dict[str, Any]:
    """How many tokens of experts differ in any bit from the same tokens in smaller batches."""
    hidden, width, experts, top_k, tokens = (64, 32, 4, 2, 70) if tiny else (2048, 768, 64, 8, 2048)
    dtype = attention.DTYPE

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=DEVICE) / math.sqrt(shape[-1])).to(dtype)

    x, gate_up, down = (
        numbers(tokens, hidden),
        numbers(experts, 2 * width, hidden),
        numbers(experts, hidden, width),
    )
    weights, chosen = torch.rand(tokens, experts, device=DEVICE).softmax(-1).topk(top_k)

    def mixed(first: int, end: int) -> torch.Tensor:
        some = slice(first, end)
        arguments = (x[some], chosen[some], weights[some], gate_up, down)
        mixture: torch.Tensor = expert_mlp(*arguments, deterministic=True, backend="triton")
        return mixture

    whole = mixed(0, tokens)
    parts = ((0, 1), (5, 6), (0, 16), (64, tokens))
    wrong = sum(int((mixed(a, b) != whole[a:b]).any(1).sum()) for a, b in parts)
    return {"kernel": "fixed experts", "error": wrong, "allowed": 0}


def host(tiny: bool) -> Rows:
    shape = Shape(1, PAGE_SIZE + 1, 1, 2, 64) if tiny else Shape(1, 4096, 8, 4, 128)
    case = attention.Case(get_format("int8"), shape)
    rounds = 1 if tiny else 200
    rows: Rows = []
    for what, fresh in (("first layer", True), ("other layers", False)):
        batches = [replace(case.batch) if fresh else case.batch for _ in range(rounds)]
        case.attend()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        for case.batch in batches:
            case.attend()
        rows.append({"attention": what, "us": (time.perf_counter() - start_s) / rounds * 1e6})
    return rows


def fixed_linears(tiny: bool) -> dict[str, Any]:
    """How many rows of a product differ in any bit from the same rows in smaller batches; and the
    time of 16 rows, relative to the library's."""
    outputs, size, rows = (64, 64, 70) if tiny else (14336, 4096, 4096)
    dtype = attention.DTYPE
    x, weight = (torch.randn(n, size, device=DEVICE).to(dtype) for n in (rows, outputs))
    whole = fixed_linear(x, weight, backend="triton")
    parts = ((0, 1), (0, 16), (5, 6), (64, rows))
    wrong = sum(
        int((fixed_linear(x[a:b], weight, backend="triton") != whole[a:b]).any(1).sum())
        for a, b in parts
    )
    few = x[:16]
    took_s = seconds(lambda: fixed_linear(few, weight, backend="triton"))
    library_s = seconds(lambda: torch.nn.functional.linear(few, weight))
    return {
        "kernel": "fixed linear",
        "error": wrong,
        "allowed": 0,
        "x_library": took_s / library_s,
    }


def grouped_linears(kind: Kind, count: int, tiny: bool) -> dict[str, Any]:
    """The error of a product with weights in few bits against fp64, and twice that of the library's
    with the decoded weights."""
    outputs, size = (70, 96) if tiny else (4096, 4096)
    weight = random_grouped(kind, outputs, size).to(DEVICE)
    x = torch.randn(min(count, 70) if tiny else count, size, device=DEVICE).to(attention.DTYPE)
    decoded = weight.decoded().to(x.dtype)
    exact = x.double() @ decoded.double().T
    plain = torch.nn.functional.linear(x, decoded)
    found = [
        grouped_linear(x, weight, deterministic=fixed, backend="triton") for fixed in (False, True)
    ]
    allowed = 2 * float((plain.double() - exact).abs().max()) + 1e-6 * float(exact.abs().max())
    return {
        "kernel": "grouped linear",
        "format": kind,
        "rows": len(x),
        "error": max(float((one.double() - exact).abs().max()) for one in found),
        "allowed": allowed,
    }


def grouped_experts(kind: Kind, tiny: bool) -> dict[str, Any]:
    """Experts in few bits against the same kernels with the decoded weights."""
    experts, hidden, width = (3, 64, 32) if tiny else (8, 2048, 768)
    stored = [
        random_grouped(kind, outputs, size, experts=experts).to(DEVICE)
        for outputs, size in ((2 * width, hidden), (hidden, width))
    ]
    x = torch.randn(9, hidden, device=DEVICE).to(attention.DTYPE)
    shares, chosen = torch.randn(9, experts, device=DEVICE).softmax(-1).topk(2, dim=-1)
    plain = [weight.decoded().to(x.dtype).contiguous() for weight in stored]
    found = expert_mlp(x, chosen, shares, stored[0], stored[1], backend="triton").double()
    expected = expert_mlp(x, chosen, shares, plain[0], plain[1], backend="triton").double()
    return {
        "kernel": "experts",
        "format": kind,
        "error": float((found - expected).abs().max()),
        "allowed": 0.01 * float(expected.abs().max()),
    }


def weights(tiny: bool) -> Rows:
    """Products of a Llama-3-8B's largest linear with weights in few bits: their share of the
    bandwidth, and how many times as long they take as the library's with bf16."""
    outputs, size = (64, 64) if tiny else (28672, 4096)
    bandwidth = copy_bandwidth()
    plain = torch.randn(outputs, size, device=DEVICE).to(attention.DTYPE)
    rows: Rows = []
    for kind in KINDS:
        weight = random_grouped(kind, outputs, size).to(DEVICE)
        for count in (1,) if tiny else (1, 16, 64, 256, 1024, 8192):
            x = torch.randn(count, size, device=DEVICE).to(attention.DTYPE)
            took_s = seconds(partial(grouped_linear, x, weight, backend="triton"))
            library_s = seconds(partial(torch.nn.functional.linear, x, plain))
            rows.append(
                {
                    "kind": kind,
                    "rows": count,
                    "us": took_s * 1e6,
                    "share": weight.num_bytes / took_s / bandwidth,
                    "x_library": took_s / library_s,
                }
            )
            print(rows[-1], flush=True)
    return rows


def ceilings(tiny: bool) -> Rows:
    size = 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=DEVICE).to(attention.DTYPE) for _ in range(2))
    took_s = seconds(lambda: a @ b)
    gb_per_s = copy_bandwidth() / 1e9
    return [{"copy_gb_per_s": gb_per_s, "matmul_tflops": 2 * size**3 / took_s / 1e12}]


def decode_attention(tiny: bool) -> Rows:
    bandwidth = copy_bandwidth()
    shapes = [attention.TINY]
    if not tiny:
        grid = {1: (4096, 32768, 131072, 1048576), 16: (4096, 32768), 256: (4096,)}
        shapes = [Shape(b, n, 8, 4, 128) for b, lengths in grid.items() for n in lengths]
    rows: Rows = []
    for shape in shapes:
        baselines = measure_baselines(shape)
        for name in ("int8",) if tiny else ("exact", "int8", "k4v4", "k2v2"):
            row = attention.measure(get_format(name), shape, bandwidth, baselines)
            if row is not None:
                attention.show(row)
                rows.append(asdict(row))
    return rows


def prefill_attention(tiny: bool) -> Rows:
    ceiling = ceilings(tiny)[0]["matmul_tflops"]
    rows: Rows = []
    for context in (200,) if tiny else (0, 32768, 131072, 1048576):
        for heads in (1,) if tiny else (8, 1):
            shape = Shape(1, context, heads, 4, 64 if tiny else 128)
            for name in ("int8",) if tiny else ("exact", "int8", "k4v4"):
                case = ChunkCase(name, shape, 40 if tiny else 8192)
                rounds = 1 if context > 2**17 or tiny else 5
                tflops = case.flops / seconds(case.attend, rounds) / 1e12
                row = {"format": name, "context": context, "kv_heads": heads, "chunk": case.chunk}
                rows.append({**row, "tflops": tflops, "share": tflops / ceiling})
                print(rows[-1], flush=True)
    return rows


def decode_step(tiny: bool) -> Rows:
    shape = SHAPES["tiny" if tiny else "llama-3-8b"]
    dtype = dtype_on(DEVICE)
    model = random_model(shape, dtype, torch.device(DEVICE))
    device = decode.Device(shape, model, dtype, copy_bandwidth(), 2 if tiny else 32)
    grid = ((256, 1),) if tiny else ((1024, 1), (131072, 1), (1048576, 1), (4096, 64))
    rows: Rows = []
    for context, batch in grid:
        for name in ("exact",) if tiny else ("exact", "int8", "k4v4", "k2v2"):
            row = device.measure(name, context, batch, not tiny, None)
            if row is not None:
                decode.show(row)
                rows.append(asdict(row))
    return rows


def requests(tiny: bool) -> Rows:
    arguments = ["--model", "tiny", "--requests", "3", "--kv-memory-mb", "4", "--scale", "4"]
    if not tiny:
        arguments = ["--model", "llama-3-8b", "--requests", "200", "--kv-memory-mb", "20000"]
    formats = ("exact",) if tiny else ("exact", "int8", "k4v4")
    return [throughput.main([*arguments, "--rounds", "1", "--format", *formats])]


def rank_sums(tiny: bool) -> Rows:
    count = torch.cuda.device_count()
    if tiny or count < 2:
        return [{"gpus": count, "skipped": "it needs two GPUs"}]
    return sums.measure(min(count, 8))


SECTIONS: dict[str, Callable[[bool], Rows]] = {
    "correct": correct,
    "host": host,
    "ceilings": ceilings,
    "weights": weights,
    "decode": decode_attention,
    "prefill": prefill_attention,
    "step": decode_step,
    "requests": requests,
    "sums": rank_sums,
}


def table(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = []
    for name, section in report["sections"].items():
        lines.append(f"{name}  ({section['seconds']:.0f} s)")
        for row in section["rows"]:
            shown = {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in row.items()
                if isinstance(value, str | int | float) and value != ""
            }
            lines.append("   " + "  ".join(f"{key} {value}" for key, value in shown.items()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    if DEVICE == "cpu" and not options.dry_run:
        raise SystemExit("this benchmark needs a CUDA GPU; without one use --dry-run")
    report: dict[str, Any] = {"conditions": conditions(), "sections": {}}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        if known["conditions"]["device"] == report["conditions"]["device"]:
            report = known
    for name in options.only:
        if name in report["sections"]:
            print(f"{name}: already in {options.output}", file=sys.stderr)
            continue
        print(f"{name} ...", flush=True)
        torch.manual_seed(0)
        start_s = time.perf_counter()
        rows = SECTIONS[name](options.dry_run)
        took_s = time.perf_counter() - start_s
        report["sections"][name] = {"seconds": round(took_s, 1), "rows": rows}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return report


if __name__ == "__main__":
    main()
