"""Baselines for decode attention: other projects' kernels over bf16 and fp8 keys and values.

Each baseline gets its own random numbers, and its output is compared with attention in fp64
before it is timed. A baseline that does not support a shape, computes something else or is
not installed (FlashInfer) is reported on stderr and gets no figure.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.device import DEVICE, ROUNDS, free_bytes, seconds

PAGE_SIZE = 64
WORKSPACE_BYTES = 512 * 2**20 if DEVICE == "cuda" else 2**20
SDPA = (
    (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    if DEVICE == "cuda"
    else (SDPBackend.MATH,)
)
# Norm of the error divided by that of the output: rounding weights to bf16 or fp8 gives .002 to
# .02, reading a wrong page or head gives more than 1.
TOLERANCE = 0.05

Decode = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of one decode step: `batch` sequences of `context` tokens each; group: query heads
    per KV head."""

    batch: int
    context: int
    kv_heads: int
    group: int
    head_dim: int

    @property
    def elements(self) -> int:
        """Number of keys and values."""
        return 2 * self.batch * self.context * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Baselines:
    """Seconds per call, None if there is no figure; and which kernel was the fastest."""

    sdpa_s: float | None
    flashinfer_s: float | None
    flashinfer_fp8_s: float | None
    fastest: dict[str, str]

    @property
    def bf16_s(self) -> float | None:
        """The fastest bf16 baseline."""
        found = [time_s for time_s in (self.sdpa_s, self.flashinfer_s) if time_s is not None]
        return min(found, default=None)


def measure_baselines(shape: Shape, rounds: int = ROUNDS) -> Baselines:
    """The fastest variant of each baseline; memory is released in between."""
    found: dict[str, float] = {}
    fastest: dict[str, str] = {}
    for name, dtype, variants in (
        ("sdpa", torch.bfloat16, sdpa_variants),
        ("flashinfer", torch.bfloat16, flashinfer_variants),
        ("flashinfer_fp8", torch.float8_e4m3fn, flashinfer_variants),
    ):
        needed, free = _needed_bytes(shape, dtype), free_bytes()
        if free is not None and needed > free:
            print(f"  {name} {shape}: {needed:,} bytes do not fit {free:,}", file=sys.stderr)
            continue
        times = variants(shape, dtype, rounds)
        if times:
            fastest[name] = min(times, key=lambda variant: times[variant])
            found[name] = times[fastest[name]]
    return Baselines(
        found.get("sdpa"), found.get("flashinfer"), found.get("flashinfer_fp8"), fastest
    )


def sdpa_variants(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """torch's own kernels on contiguous keys and values."""
    q, kv = _numbers(shape, dtype, (2, shape.batch, shape.kv_heads, shape.context, shape.head_dim))
    want = _expected(q, kv[0, 0], kv[1, 0])
    times: dict[str, float] = {}
    for backend in SDPA:

        def decode(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q.unsqueeze(2), kv[0], kv[1], enable_gqa=True
                ).squeeze(2)

        _time(times, backend.name.lower(), decode, want, rounds)
    return times


def flashinfer_variants(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """FlashInfer's paged decode, on CUDA cores and on tensor cores (for groups of queries).

    Source: flashinfer.BatchDecodeWithPagedKVCacheWrapper, layout HND: pages are
    [num_pages, 2, num_kv_heads, page_size, head_dim], like our hot pages. Fp8 has scale 1.
    """
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    try:
        flashinfer: Any = importlib.import_module("flashinfer")
    except Exception as error:  # a third-party package can fail to load in many ways
        _report_skipped("flashinfer", error)
        return {}
    pages = -(-shape.context // PAGE_SIZE)
    total = pages * shape.batch
    q, kv = _numbers(shape, dtype, (total, 2, shape.kv_heads, PAGE_SIZE, shape.head_dim))
    table = torch.randperm(total, device=DEVICE).int()
    # The first sequence's keys and values; as integers, because indexing supports them everywhere.
    first = kv.view(torch.int8 if dtype.itemsize == 1 else torch.int16)[table[:pages].long()]
    k, v = first.view(dtype).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : shape.context]
    want = _expected(q, k, v)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE) * pages
    last = shape.context - (pages - 1) * PAGE_SIZE
    last_lens = torch.full((shape.batch,), last, dtype=torch.int32, device=DEVICE)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    times: dict[str, float] = {}
    for tensor_cores in (False, True):
        name = "tensor cores" if tensor_cores else "cuda cores"
        try:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=tensor_cores
            )
            wrapper.plan(
                starts,
                table,
                last_lens,
                shape.kv_heads * shape.group,
                shape.kv_heads,
                shape.head_dim,
                PAGE_SIZE,
                q_data_type=q.dtype,
                kv_data_type=kv.dtype,
            )
        except Exception as error:  # it may have to compile, and fail without a compiler
            _report_skipped(f"flashinfer, {name}, {dtype}", error)
            continue
        _time(times, name, lambda wrapper=wrapper: wrapper.run(q, kv), want, rounds)  # type: ignore[misc]
    return times


def _needed_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """All keys and values, a copy of the first sequence's, and one head of it in fp64."""
    first = shape.elements // shape.batch
    stored = (shape.elements + first) * dtype.itemsize
    return stored + 3 * 8 * first // shape.kv_heads + WORKSPACE_BYTES


def _numbers(
    shape: Shape, dtype: torch.dtype, kv_shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randn(shape.batch, shape.kv_heads * shape.group, shape.head_dim, device=DEVICE)
    kv = torch.empty(kv_shape, dtype=dtype, device=DEVICE)
    for part in kv.view(-1).split(2**26):  # in parts: all of it in bf16 would not fit next to fp8
        part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=DEVICE))
    return q.bfloat16(), kv


def _expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """For the first sequence, [num_heads, head_dim] fp64; k, v: [kv_heads, tokens, head_dim]"""
    outs = []
    for queries, keys, values in zip(q[0].unflatten(0, (k.shape[0], -1)), k, v, strict=True):
        scores = queries.double() @ keys.double().T * q.shape[-1] ** -0.5
        outs.append(torch.softmax(scores, -1) @ values.double())
    return torch.cat(outs)


def _time(
    times: dict[str, float], name: str, decode: Decode, want: torch.Tensor, rounds: int
) -> None:
    """Time correct kernels; one that refuses or is not correct is reported and skipped."""
    try:
        error = float((decode()[0].double() - want).norm() / want.norm())
        if error > TOLERANCE:
            raise RuntimeError(f"its output is off by {error:.2e} of the output")
        times[name] = seconds(decode, rounds)
    except Exception as error:  # a third-party kernel can fail in many ways
        _report_skipped(name, error)


def _report_skipped(name: str, error: Exception) -> None:
    lines = str(error).splitlines()
    print(f"  {name}: {lines[0] if lines else type(error).__name__}", file=sys.stderr)
