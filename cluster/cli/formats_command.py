"""`kvmesh formats`: the KV formats, their sizes and their requirements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvmesh.cluster.cli.console import out, print_json
from kvmesh.cluster.cli.options import JsonOption, QuietOption
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.workers.config import PAGE_SIZES

BF16_BITS = 16


@dataclass(frozen=True, slots=True)
class FormatRow:
    """One format with a given head_dim and page size.

    k_bits, v_bits, bits: of keys, values and both, per element of a sealed page including
        metadata; None if the format does not support the head_dim
    capacity: tokens of sealed pages in the memory of one bfloat16 token
    comparison: whether it is there to compare with, and slow
    """

    name: str
    k_bits: float | None
    v_bits: float | None
    bits: float | None
    capacity: float | None
    sink_pages: int
    recent_pages: int
    needs_calibration: bool
    comparison: bool
    aliases: tuple[str, ...]


def formats(
    head_dim: Annotated[int, typer.Option(min=1, help="head_dim of the model.")] = 128,
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 64,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the KV formats: bits, capacity, exact windows, calibration, aliases."""
    if page_size not in PAGE_SIZES:
        sizes = ", ".join(map(str, PAGE_SIZES))
        raise typer.BadParameter(
            f"must be one of {sizes}; got {page_size}", param_hint="--page-size"
        )
    rows = [describe(get_format(name), head_dim, page_size) for name in format_names()]
    if as_json:
        print_json(rows)
        return
    out.print(f"KV formats with head_dim {head_dim} and {page_size} tokens per page")
    out.print(_table([row for row in rows if not row.comparison]))
    out.print("To compare with, in plain torch: served and evaluated by name, but slowly")
    out.print(_table([row for row in rows if row.comparison]))
    out.print(
        "[dim]bits: per element of a sealed page, including metadata; capacity: relative to\n"
        "bf16; exact pages: first + latest, not sealed, besides the page being written[/dim]"
    )


def describe(fmt: KVFormat, head_dim: int, page_size: int) -> FormatRow:
    try:
        bits: float | None = fmt.bits_per_element(page_size, head_dim)
    except ValueError:  # the format does not support this head_dim
        bits = None
    return FormatRow(
        name=fmt.name,
        k_bits=None if bits is None else fmt.k.bits_per_element(page_size, head_dim),
        v_bits=None if bits is None else fmt.v.bits_per_element(page_size, head_dim),
        bits=bits,
        capacity=None if bits is None else BF16_BITS / bits,
        sink_pages=fmt.sink_pages,
        recent_pages=fmt.recent_pages,
        needs_calibration=fmt.needs_calibration,
        comparison=fmt.comparison,
        aliases=fmt.aliases,
    )


def _table(rows: list[FormatRow]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("KV format", no_wrap=True)
    for name in ("K bits", "V bits", "mean", "capacity"):
        table.add_column(name, justify="right")
    table.add_column("exact\npages", justify="center")
    table.add_column("calib-\nration")
    table.add_column("aliases")
    for row in rows:
        table.add_row(
            row.name,
            *(_figure(value) for value in (row.k_bits, row.v_bits, row.bits)),
            _figure(row.capacity) + ("" if row.capacity is None else "×"),
            f"{row.sink_pages} + {row.recent_pages}",
            "needed" if row.needs_calibration else "",
            ", ".join(row.aliases),
        )
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
