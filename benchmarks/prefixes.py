"""Decode over a prefix that all sequences share: read once for all of them, or by each alone.

    python benchmarks/prefixes.py [--output FILE] [--dry-run] [--format NAME ...]

Needs only torch and triton, and a CUDA GPU, like `attention.py`, whose pools it uses. Sequences
are put into sets like on a rank, if `sharers` says that it pays; a format for which it never
pays at a shape is skipped. Both ways must agree up to bf16's rounding before they are timed.

    ratio    the time alone divided by the time together
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from benchmarks.attention import CAPABILITY, DTYPE, PAGE_SIZE, Case, case_bytes
from benchmarks.baselines import Shape
from benchmarks.device import DEVICE, clocks, conditions, free_bytes, seconds
from benchmarks.kernel_formats import FORMATS
from kvmesh.kernels.attention import SharedPrefixes
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_launch import sharers
from kvmesh.kernels.formats.registry import get_format

# Sequences, tokens per sequence, and how many of them are the prefix.
GRID = tuple(
    (Shape(batch, context, 8, group, 128), shared)
    for group in (4, 8)
    for batch in (16, 64)
    for context, shared in ((4096, 2048), (32768, 30720))
)
TINY = (Shape(8, 400, 1, 16, 64), 256)


@dataclass(frozen=True)
class Row:
    """sets: number of sets, of `members` sequences each"""

    shape: Shape
    shared: int
    kv_format: str
    sets: int
    members: int
    difference: float
    alone_us: float
    together_us: float
    ratio: float
    clocks: str


def measure(name: str, shape: Shape, shared: int) -> Row | None:
    fmt = get_format(name)
    geometry = Geometry(shape.kv_heads, shape.group, shape.head_dim, PAGE_SIZE, DTYPE.itemsize)
    min_members, max_members = sharers(fmt, geometry, CAPABILITY)
    members = min(max_members, shape.batch)
    needed, free = case_bytes(fmt, shape), free_bytes()
    if members < min_members or (free is not None and needed > free):
        why = "no set pays" if members < min_members else f"{needed:,} bytes do not fit {free:,}"
        print(f"{name} {shape}: {why}", file=sys.stderr)
        return None
    case = Case(fmt, shape)
    pages, sets = shared // PAGE_SIZE, shape.batch // members
    case.batch.sealed_tables[:, :pages] = case.batch.sealed_tables[0, :pages].clone()
    sharing = sets * members
    prefixes = SharedPrefixes(
        pages=(torch.arange(shape.batch, device=DEVICE) < sharing).int() * pages,
        members=torch.arange(shape.batch, dtype=torch.int32, device=DEVICE),
        starts=torch.arange(0, sharing + 1, members, dtype=torch.int32, device=DEVICE),
    )
    alone, _ = case.attend()
    alone_s = seconds(case.attend)
    case.batch = replace(case.batch, prefixes=prefixes)
    together, _ = case.attend()
    difference = float((together.float() - alone.float()).abs().max())
    allowed = 2**-7 * float(alone.abs().max())
    if not difference <= allowed:
        raise SystemExit(f"{name} {shape}: they differ by {difference:.2e}, allowed {allowed:.2e}")
    together_s = seconds(case.attend)
    return Row(
        shape=shape,
        shared=shared,
        kv_format=name,
        sets=sets,
        members=members,
        difference=difference,
        alone_us=round(alone_s * 1e6, 1),
        together_us=round(together_s * 1e6, 1),
        ratio=round(alone_s / together_s, 2),
        clocks=clocks(),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="one tiny shape, also without a GPU")
    parser.add_argument("--format", nargs="+", default=list(FORMATS))
    options = parser.parse_args(arguments)
    if DEVICE == "cpu" and not options.dry_run:
        raise SystemExit("this benchmark needs a CUDA GPU; without one use --dry-run")
    torch.manual_seed(0)
    report: dict[str, Any] = {"conditions": conditions(), "rows": []}
    print(report["conditions"])
    print(
        f"{'format':9} {'batch':>5} {'tokens':>7} {'shared':>7} {'sets':>8} {'us':>18} {'ratio':>7}"
    )
    for shape, shared in (TINY,) if options.dry_run else GRID:
        for name in options.format:
            row = measure(name, shape, shared)
            if row is None:
                continue
            report["rows"].append(asdict(row))
            print(
                f"{name:9} {shape.batch:>5} {shape.context:>7} {shared:>7}"
                f" {row.sets:>3} x {row.members:<2} {row.alone_us:>8.1f} -> {row.together_us:<8.1f}"
                f"{row.ratio:>5.2f}",
                flush=True,
            )
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
