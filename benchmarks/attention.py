"""Decode attention on a GPU: share of memory bandwidth by shape and KV format.

    python benchmarks/attention.py [--output FILE] [--quick] [--tune] [--format NAME ...]

Needs torch and triton only, and runs from a checkout. For each shape the output
is first compared with attention in fp64 over the decoded pages, by
FlashAttention's rule; a case that fails it is not timed and the run fails.
Then, over pools larger than the caches:

    bytes      what had to be read: sealed and hot pages of every sequence, once
    GB/s       bytes over the median time of one call
    share      of the bandwidth of a large device copy in the same run
    speed-up   the time of torch SDPA on contiguous bf16 keys and values, by ours

The GPU's clocks are taken as found.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvmesh.kernels.attention import AttentionBatch, paged_attention, triton_attention
from kvmesh.kernels.attention.triton_attention import Launch, takes_integer_path
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.kernels.formats.tiles_triton import why_no_kernels
from kvmesh.kernels.seal import seal_pages

PAGE_SIZE = 64
DEVICE = "cuda"
MAX_CONTIGUOUS_BYTES = 24 * 2**30
CONTENT_PAGES = 256
# g64-hqq is sealed otherwise than g64-int and read alike.
FORMATS = tuple(
    name
    for name in format_names()
    if why_no_kernels(get_format(name)) is None and not name.startswith("g64-hqq")
)
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


@dataclass(frozen=True)
class Shape:
    batch: int
    context: int
    kv_heads: int
    group: int
    head_dim: int

    @property
    def contiguous_bytes(self) -> int:
        return 4 * self.batch * self.context * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Row:
    """path: "integer" or "plain", with how it was compiled
    error, error_allowed: largest of the output against fp64, and twice same-dtype torch's
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
    speed_up: float | None


def shapes(quick: bool) -> Iterator[Shape]:
    heads = [(8, 4, 128), (8, 8, 128), (32, 1, 128), (8, 4, 64)]
    if quick:
        heads = heads[1:2]
    for kv_heads, group, head_dim in heads:
        for batch in (1, 8, 64):
            for context in (4096, 32768, 131072, 1048576):
                shape = Shape(batch, context, kv_heads, group, head_dim)
                if context == 1048576 and batch > 1:
                    continue
                if shape.contiguous_bytes <= MAX_CONTIGUOUS_BYTES:
                    yield shape


class Case:
    """A pool full of pages of random numbers, shuffled, and one decode step over it."""

    def __init__(self, fmt: KVFormat, shape: Shape) -> None:
        self.fmt = fmt
        self.shape = shape
        pages = shape.context // PAGE_SIZE
        total = pages * shape.batch
        # The last page of each sequence is hot, all others are sealed.
        self.hot = torch.randn(
            shape.batch, 2, shape.kv_heads, PAGE_SIZE, shape.head_dim, device=DEVICE
        ).bfloat16()
        page_bytes = fmt.page_bytes(PAGE_SIZE, shape.head_dim)
        self.sealed = torch.empty(
            total, shape.kv_heads, page_bytes, dtype=torch.uint8, device=DEVICE
        )
        # Some pages of content, repeated: the bytes read are as many, the sealing is quick.
        count = min(total, CONTENT_PAGES)
        content = torch.randn(
            count, 2, shape.kv_heads, PAGE_SIZE, shape.head_dim, device=DEVICE
        ).bfloat16()
        ids = torch.arange(count, dtype=torch.int32, device=DEVICE)
        seal_pages(content, self.sealed, ids, ids, fmt=fmt)
        for start in range(count, total, count):
            self.sealed[start : start + count] = self.sealed[: min(count, total - start)]
        table = torch.randperm(total, device=DEVICE).int().view(shape.batch, pages)
        hot_table = torch.full_like(table, -1)
        hot_table[:, -1] = torch.arange(shape.batch, device=DEVICE)
        self.q = torch.randn(
            shape.batch, shape.kv_heads * shape.group, shape.head_dim, device=DEVICE
        ).bfloat16()
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
        hot_bytes = self.hot.numel() * 2
        self.bytes = (pages - 1) * shape.batch * shape.kv_heads * page_bytes + hot_bytes

    def attend(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.shape.head_dim**-0.5
        return paged_attention(self.q, self.hot, self.sealed, self.batch, fmt=self.fmt, scale=scale)

    def errors(self) -> tuple[float, float]:
        """Of the first and the last sequence: ours, and twice that of torch in bf16."""
        out, _ = self.attend()
        ours, allowed = 0.0, 0.0
        for seq in {0, self.shape.batch - 1}:
            k, v = self._decoded(seq)
            want = _naive(self.q[seq].double(), k, v, chunk_dtype=torch.float64)
            same = _naive(self.q[seq], k.bfloat16(), v.bfloat16(), chunk_dtype=torch.bfloat16)
            ours = max(ours, float((out[seq].double() - want).abs().max()))
            allowed = max(allowed, 2 * float((same.double() - want).abs().max()))
        return ours, allowed + 1e-4

    def _decoded(self, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[kv_heads, tokens, head_dim] each, what the pages of one sequence stand for."""
        pages = self.sealed[self.batch.sealed_tables[seq, :-1].long()]
        stored = torch.bfloat16 if self.fmt.name == "exact" else torch.float32
        decoded = self.fmt.decode(pages, PAGE_SIZE, self.shape.head_dim, stored)
        k, v = (
            torch.cat((x.float(), self.hot[seq : seq + 1, part].float())).transpose(0, 1)
            for part, x in enumerate(decoded)
        )
        return k.flatten(1, 2), v.flatten(1, 2)


def _naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_dtype: torch.dtype
) -> torch.Tensor:
    """Attention of one query [heads, head_dim] in the given dtype, a KV head at a time."""
    group = q.shape[0] // k.shape[0]
    outs = []
    for head in range(k.shape[0]):
        scores = q[head * group : (head + 1) * group] @ k[head].to(chunk_dtype).T
        weights = torch.softmax(scores * q.shape[-1] ** -0.5, dim=-1)
        outs.append(weights @ v[head].to(chunk_dtype))
    return torch.cat(outs)


def seconds(step: Callable[[], object], rounds: int = 15) -> float:
    """Median time of one call; the launches are captured, so that the host does not count."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def sdpa_seconds(shape: Shape) -> float:
    """The fastest of torch's own kernels on contiguous bf16."""
    k, v = torch.randn(
        2, shape.batch, shape.kv_heads, shape.context, shape.head_dim,
        device=DEVICE, dtype=torch.bfloat16,
    )  # fmt: skip
    q = torch.randn(
        shape.batch, shape.kv_heads * shape.group, 1, shape.head_dim,
        device=DEVICE, dtype=torch.bfloat16,
    )  # fmt: skip
    best = math.inf
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                best = min(
                    best,
                    seconds(
                        lambda: torch.nn.functional.scaled_dot_product_attention(
                            q, k, v, enable_gqa=True
                        )
                    ),
                )
        except RuntimeError as error:  # a backend that does not take this shape
            print(f"  {backend.name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return best


def launch_of(fmt: KVFormat, shape: Shape) -> tuple[str, Launch]:
    """Which path decode takes, and how that is compiled."""
    capability = torch.cuda.get_device_capability()
    geometry = (fmt, shape.head_dim, shape.group, PAGE_SIZE)
    if takes_integer_path(
        fmt, shape.head_dim, PAGE_SIZE, dtype=torch.bfloat16, capability=capability
    ):
        return "integer", triton_attention.integer_launch(*geometry)
    return "plain", triton_attention.decode_launch(*geometry)


def measure(
    fmt: KVFormat, shape: Shape, bandwidth: float, sdpa_s: float | None, rounds: int = 15
) -> Row:
    case = Case(fmt, shape)
    error, allowed = case.errors()
    if error > allowed:
        raise SystemExit(f"{fmt.name} {shape}: error {error:.2e}, allowed {allowed:.2e}")
    time_s = seconds(case.attend, rounds)
    path, launch = launch_of(fmt, shape)
    return Row(
        shape,
        fmt.name,
        path,
        launch.options,
        error,
        allowed,
        case.bytes,
        round(time_s * 1e6, 1),
        round(case.bytes / time_s / 1e9, 1),
        round(case.bytes / time_s / bandwidth, 3),
        round(sdpa_s * 1e6, 1) if sdpa_s else None,
        round(sdpa_s / time_s, 2) if sdpa_s else None,
    )


def show(row: Row) -> None:
    s = row.shape
    print(
        f"{row.kv_format:9} b{s.batch:<3} {s.context:>8} {s.kv_heads}x{s.group} d{s.head_dim:<4}"
        f" {row.path:8} {row.time_us:>9.1f} us {row.gb_per_s:>7.1f} GB/s"
        f" {row.share:>6.1%}  x{row.speed_up or math.nan:.2f}  err {row.error:.1e}"
        f"  {row.options}",
        flush=True,
    )


def tune(names: list[str], bandwidth: float) -> list[Row]:
    """Warps and stages, or stages and registers, at one long shape."""
    shape = Shape(8, 131072, 8, 8, 128)
    rows = []
    for name in names:
        fmt = get_format(name)
        path, launch = launch_of(fmt, shape)
        if path == "integer":
            attribute = "integer_launch"
            tried = [
                {"num_warps": 1, "num_stages": stages, **registers}
                for stages in (2, 3, 4, 5)
                for registers in ({}, {"maxnreg": 168}, {"maxnreg": 208})
            ]
        else:
            attribute = "decode_launch"
            tried = [
                {"num_warps": warps, "num_stages": stages}
                for warps in (1, 2, 4, 8)
                for stages in (2, 3, 4)
            ]
        chosen = getattr(triton_attention, attribute)
        for options in tried:
            other = replace(launch, options=options)
            setattr(triton_attention, attribute, lambda *_, other=other, **__: other)
            try:
                rows.append(measure(fmt, shape, bandwidth, None, rounds=5))
                show(rows[-1])
            except triton.runtime.errors.OutOfResources as error:
                print(f"{name} {options}: {error}", file=sys.stderr)
            finally:
                setattr(triton_attention, attribute, chosen)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="one head layout only")
    parser.add_argument("--tune", action="store_true", help="also try how kernels are compiled")
    parser.add_argument("--format", nargs="*", default=list(FORMATS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU; see benchmarks/sass.py without one")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    clocks = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    conditions = {
        "device": torch.cuda.get_device_name(),
        "clocks": clocks,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "page_size": PAGE_SIZE,
        "dtype": "bfloat16",
    }
    print(conditions)
    rows = tune(options.format, bandwidth) if options.tune else []
    for shape in shapes(options.quick):
        sdpa_s = sdpa_seconds(shape)
        for name in options.format:
            torch.cuda.empty_cache()
            rows.append(measure(get_format(name), shape, bandwidth, sdpa_s))
            show(rows[-1])
    if options.output:
        report = {"conditions": conditions, "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
