"""`kvmesh formats`: every KV format, what it takes and what it asks for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvmesh.cluster.cli.console import EXIT_USAGE, fail, out
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.workers.config import PAGE_SIZES

BF16_BITS = 16


@dataclass(frozen=True, slots=True)
class FormatLine:
    """One format at a head_dim and page size.

    k_bits, v_bits, bits: of keys, values and both, per element of a sealed page with its
        metadata; None where the format does not hold such heads
    capacity: tokens in the memory of one in bfloat16, by sealed pages
    """

    name: str
    k_bits: float | None
    v_bits: float | None
    bits: float | None
    capacity: float | None
    sink_pages: int
    recent_pages: int
    needs_calibration: bool
    aliases: tuple[str, ...]


def formats(
    head_dim: Annotated[int, typer.Option(min=1, help="Of the model's heads.")] = 128,
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the KV formats: bits, capacity, exact windows, calibration, aliases."""
    if page_size not in PAGE_SIZES:
        sizes = ", ".join(map(str, PAGE_SIZES))
        fail(f"--page-size: must be one of {sizes}; got {page_size}", EXIT_USAGE)
    lines = [describe(get_format(name), head_dim, page_size) for name in format_names()]
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines], indent=2))
        return
    out.print(f"KV formats at head_dim {head_dim} and {page_size} tokens a page")
    out.print(_table(lines))
    out.print(
        "[dim]bits: an element of a sealed page takes, metadata included; capacity: against\n"
        "bf16; exact pages: first + latest, kept unsealed, besides the one being written[/dim]"
    )


def describe(fmt: KVFormat, head_dim: int, page_size: int) -> FormatLine:
    try:
        bits: float | None = fmt.bits_per_element(page_size, head_dim)
    except ValueError:  # not every format goes with every head_dim
        bits = None
    k_bits, v_bits = (None, None) if bits is None else _sides(fmt, bits)
    return FormatLine(
        name=fmt.name,
        k_bits=k_bits,
        v_bits=v_bits,
        bits=bits,
        capacity=None if bits is None else BF16_BITS / bits,
        sink_pages=fmt.sink_pages,
        recent_pages=fmt.recent_pages,
        needs_calibration=fmt.needs_calibration,
        aliases=fmt.aliases,
    )


def _sides(fmt: KVFormat, bits: float) -> tuple[float, float]:
    """Bits of keys and of values: their codes, and of the metadata a half each."""
    if not fmt.k_bits:
        return bits, bits
    metadata = bits - (fmt.k_bits + fmt.v_bits) / 2
    return fmt.k_bits + metadata, fmt.v_bits + metadata


def _table(lines: list[FormatLine]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("KV format", no_wrap=True)
    for name in ("K bits", "V bits", "mean", "capacity"):
        table.add_column(name, justify="right")
    table.add_column("exact\npages", justify="center")
    table.add_column("calib-\nration")
    table.add_column("aliases")
    for line in lines:
        table.add_row(
            line.name,
            *(_figure(value) for value in (line.k_bits, line.v_bits, line.bits)),
            _figure(line.capacity) + ("" if line.capacity is None else "×"),
            f"{line.sink_pages} + {line.recent_pages}",
            "needed" if line.needs_calibration else "",
            ", ".join(line.aliases),
        )
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
