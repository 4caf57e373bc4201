"""Decode attention on the CPU: kvmesh compared with torch SDPA on contiguous KV.

    python benchmarks/attention_cpu.py [--output FILE] [--threads N] [--rounds N]

Shapes are the embedded model's (9 heads, 3 KV heads, head_dim 64, fp32). A call is one
layer of one decode step: `write_hot` and `paged_attention`. Every layer has its own
memory, more than fits the caches. SDPA gets contiguous keys and values and grouped heads;
it writes nothing and returns no lse. Both sides are timed alternately and the median is
taken. A case is timed only after its output has been checked against SDPA on the decoded
keys and values. Calibrated formats get parameters for normal numbers, the same for all
layers.

The second table is for sequences that share a prefix: its pages are read once for all of
them, compared with the same batch in which each sequence reads them separately.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.stand_in_params import params_for
from kvmesh.kernels.attention import AttentionBatch, SharedPrefixes, paged_attention
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.kernels.seal import seal_pages
from kvmesh.kernels.write import write_hot

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 9, 3, 64, 64
SCALE = HEAD_DIM**-0.5
MAX_BYTES = 384 * 2**20


@dataclass(frozen=True)
class Row:
    """ratio: SDPA's time divided by ours; above 1 we are faster."""

    kv_format: str
    batch: int
    context: int
    layers: int
    kvmesh_us: float
    sdpa_us: float
    ratio: float
    max_error: float


@dataclass(frozen=True)
class SharedRow:
    """ratio: the time alone divided by the time together."""

    kv_format: str
    batch: int
    context: int
    shared: int
    layers: int
    alone_us: float
    together_us: float
    ratio: float
    max_difference: float


class Case:
    """Layers of pools, the same keys and values contiguously, and one decode step over them."""

    def __init__(self, fmt: KVFormat, batch: int, context: int, layers: int) -> None:
        pages = -(-context // PAGE_SIZE)
        shape = (pages * batch, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
        self.fmt = fmt
        self.layers = layers
        self.params = params_for(fmt, KV_HEADS, HEAD_DIM)
        positions = torch.arange(pages).repeat(batch) * PAGE_SIZE
        order = torch.randperm(pages * batch, dtype=torch.int32)
        self.sealed_tables = order.view(batch, pages)
        self.hot_tables = torch.full_like(self.sealed_tables, -1)
        self.hot_tables[:, -1] = torch.arange(batch, dtype=torch.int32)
        offset = (context - 1) % PAGE_SIZE
        self.slots = torch.arange(batch) * PAGE_SIZE + offset
        self.context = context
        self.hot, self.sealed, self.contiguous = [], [], []
        page_bytes = fmt.page_bytes(PAGE_SIZE, HEAD_DIM, 4)
        for _ in range(layers):
            exact = torch.randn(shape)
            sealed = torch.zeros(pages * batch, KV_HEADS, page_bytes, dtype=torch.uint8)
            ids = torch.arange(pages * batch, dtype=torch.int32)
            seal_pages(exact, sealed, ids, order, fmt=fmt, params=self.params, positions=positions)
            by_sequence = exact.view(batch, pages, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
            self.hot.append(by_sequence[:, -1].clone())
            self.sealed.append(sealed)
            whole = by_sequence.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :context]
            self.contiguous.append(whole.contiguous())
        self.q = torch.randn(batch, HEADS, HEAD_DIM)
        self.k, self.v = torch.randn(2, batch, KV_HEADS, HEAD_DIM)

    def share(self, pages: int) -> None:
        """Let all sequences read the first sequence's first pages."""
        self.sealed_tables[:, :pages] = self.sealed_tables[0, :pages]
        num_seqs = self.q.shape[0]
        self.prefixes = SharedPrefixes(
            pages=torch.full((num_seqs,), pages, dtype=torch.int32),
            members=torch.arange(num_seqs, dtype=torch.int32),
            starts=torch.tensor([0, num_seqs], dtype=torch.int32),
        )

    def batch(self, prefixes: SharedPrefixes | None = None) -> AttentionBatch:
        num_seqs = self.q.shape[0]
        return AttentionBatch(
            query_starts=torch.arange(num_seqs + 1, dtype=torch.int32),
            seq_lens=torch.full((num_seqs,), self.context, dtype=torch.int32),
            rows=torch.arange(num_seqs, dtype=torch.int32),
            hot_tables=self.hot_tables,
            sealed_tables=self.sealed_tables,
            page_size=PAGE_SIZE,
            sink_pages=0,
            recent_pages=0,
            max_query_len=1,
            max_seq_len=self.context,
            prefixes=prefixes,
        )

    def paged(self, prefixes: SharedPrefixes | None = None) -> torch.Tensor:
        batch = self.batch(prefixes)
        for hot, sealed in zip(self.hot, self.sealed, strict=True):
            write_hot(self.k, self.v, hot, self.slots)
            out, _ = paged_attention(
                self.q, hot, sealed, batch, fmt=self.fmt, scale=SCALE, params=self.params
            )
        return out

    def sdpa(self) -> torch.Tensor:
        for kv in self.contiguous:
            out = torch.nn.functional.scaled_dot_product_attention(
                self.q.unsqueeze(2), kv[0], kv[1], scale=SCALE, enable_gqa=True
            )
        return out.squeeze(2)

    def max_error(self) -> float:
        """Of the last layer, against SDPA on the decoded pages."""
        out = self.paged()
        kv = self.contiguous[-1].clone()
        full = (self.context - 1) // PAGE_SIZE * PAGE_SIZE
        for seq, row in enumerate(self.sealed_tables[:, : full // PAGE_SIZE]):
            pages = self.sealed[-1][row.long()]
            decoded = self.fmt.decode(pages, PAGE_SIZE, HEAD_DIM, kv.dtype, self.params)
            for part, x in enumerate(decoded):
                kv[part, seq, :, :full] = x.transpose(0, 1).flatten(1, 2)
        kv[0, :, :, self.context - 1], kv[1, :, :, self.context - 1] = self.k, self.v
        self.contiguous.append(kv)
        want = self.sdpa()
        self.contiguous.pop()
        return float((out - want).abs().max())


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(fmt: KVFormat, batch: int, context: int, rounds: int) -> Row:
    exact_bytes = 2 * KV_HEADS * HEAD_DIM * 4 * batch * context
    layers = max(3, min(30, MAX_BYTES // exact_bytes))
    case = Case(fmt, batch, context, layers)
    error = case.max_error()
    if error > 5e-5:
        raise SystemExit(f"{fmt.name} batch {batch} context {context}: error {error:.2e}")
    case.sdpa()
    times = [(seconds(case.paged), seconds(case.sdpa)) for _ in range(rounds)]
    ours, theirs = (statistics.median(side) / layers * 1e6 for side in zip(*times, strict=True))
    ratio = round(theirs / ours, 2)
    return Row(fmt.name, batch, context, layers, round(ours, 1), round(theirs, 1), ratio, error)


def measure_shared(fmt: KVFormat, batch: int, context: int, shared: int, rounds: int) -> SharedRow:
    case = Case(fmt, batch, context, layers=3)
    case.share(shared // PAGE_SIZE)
    difference = float((case.paged() - case.paged(case.prefixes)).abs().max())
    if difference > 5e-5:
        raise SystemExit(f"{fmt.name}: read together differs by {difference:.2e}")
    times = [
        (seconds(case.paged), seconds(lambda: case.paged(case.prefixes))) for _ in range(rounds)
    ]
    alone, together = (
        statistics.median(side) / case.layers * 1e6 for side in zip(*times, strict=True)
    )
    ratio = round(alone / together, 2)
    return SharedRow(
        fmt.name,
        batch,
        context,
        shared,
        case.layers,
        round(alone, 1),
        round(together, 1),
        ratio,
        difference,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kv-format", default=",".join(format_names()))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    print(f"{'format':8}{'batch':>6}{'context':>9}{'kvmesh us':>11}{'sdpa us':>10}{'ratio':>7}")
    for batch in (1, 16):
        for context in (500, 2000, 8000):
            for name in options.kv_format.split(","):
                row = measure(get_format(name), batch, context, options.rounds)
                rows.append(row)
                print(
                    f"{row.kv_format:8}{batch:6}{context:9}{row.kvmesh_us:11.1f}"
                    f"{row.sdpa_us:10.1f}{row.ratio:7.2f}",
                    flush=True,
                )
    print(
        f"\n{'format':8}{'batch':>6}{'context':>9}{'shared':>8}{'alone us':>10}{'together us':>13}"
    )
    shared_rows = []
    for batch, context, shared in ((4, 2000, 1536), (16, 2000, 1536), (16, 8000, 7680)):
        for name in options.kv_format.split(","):
            found = measure_shared(get_format(name), batch, context, shared, options.rounds)
            shared_rows.append(found)
            print(
                f"{name:8}{batch:6}{context:9}{shared:8}{found.alone_us:10.1f}"
                f"{found.together_us:13.1f}{found.ratio:7.2f}",
                flush=True,
            )
    if options.output:
        conditions = {
            "device": platform.processor() or platform.machine(),
            "threads": options.threads,
            "torch": torch.__version__,
            "dtype": "float32",
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "page_size": PAGE_SIZE,
            "rounds": options.rounds,
        }
        report = {
            "conditions": conditions,
            "rows": [asdict(row) for row in rows],
            "shared": [asdict(row) for row in shared_rows],
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
