"""`kvmesh plan`: what a model can do on given GPUs, by layout and KV format."""

from __future__ import annotations

import difflib
import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cluster.cli.console import print_json
from kvmesh.cluster.cli.exits import errors_by_option
from kvmesh.cluster.cli.options import JsonOption, QuietOption
from kvmesh.cluster.cli.plan_view import as_fields, show
from kvmesh.cluster.cli.plots import plotter
from kvmesh.workers.config import PAGE_SIZES, WEIGHT_FORMATS
from kvmesh.workers.errors import ConfigError

if TYPE_CHECKING:
    from kvmesh.cluster.simulator.hardware import Gpu
    from kvmesh.kernels.formats.base import KVFormat

_TOKENS = re.compile(r"(\d+(?:[_,]\d+)*(?:\.\d+)?)\s*([km]?)", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
MAX_TOKENS = 1 << 40
MAX_CONCURRENCY = 1 << 20
# Names that people use for the most common variant.
_GPU_ALIASES = {"a100": "a100-80g", "a100-80gb": "a100-80g", "a100-40gb": "a100-40g"}


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="A model's directory, its config.json, a hub name that was downloaded before, or "
            "a well-known name, e.g. llama-3-8b; no weights are needed."
        ),
    ],
    gpu: Annotated[str, typer.Option(help="The GPUs, e.g. h100, h200, a100.")] = "h100",
    gpus: Annotated[int, typer.Option(help="How many, a power of two.")] = 1,
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a sequence, e.g. 131072, 128k or 1M (1,048,576); default: the model's."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Sequences of that length to run at once.")] = 1,
    kv_format: Annotated[
        str | None, typer.Option(help="Comma-separated KV formats; default: all for serving.")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 64,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU that weights, activations and KV may fill.")
    ] = 0.9,
    weight_format: Annotated[
        str,
        typer.Option(
            help="How weights are stored: exact (as in the checkpoint), int8, int4, fp8 or decoded."
        ),
    ] = "exact",
    every: Annotated[
        bool, typer.Option("--all", help="Print every layout with every format.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Plot the longest context by bits to this file.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """What a model can do on given GPUs: contexts, memory, times, and what to serve."""
    from kvmesh.cluster.planner.model import planned_model
    from kvmesh.cluster.planner.plan import Target, default_formats, make_plans, recommend

    draw = None if plot is None else plotter(plot, "--plot", "plan_plot", "plot_plans")
    with errors_by_option():
        device, found = _gpu(gpu), planned_model(model)
        target = Target(
            context=found.max_model_len if context is None else _tokens(context),
            concurrency=_concurrency(concurrency),
            page_size=_page_size(page_size),
            gpu_memory_utilization=_share(gpu_memory_utilization),
            weight_format=_weight_format(weight_format),
        )
        named = _formats(kv_format)
        plans = make_plans(found, device, gpus, named or default_formats(found, page_size), target)
    best = recommend(plans, target, all_formats=not named)
    if as_json:
        print_json(as_fields(found, device, gpus, target, plans, best))
    else:
        show(found, device, gpus, target, plans, best, every=every)
    if draw is not None:
        draw(found, device, plans, target)


def _gpu(name: str) -> Gpu:
    from kvmesh.cluster.simulator.hardware import GPUS

    wanted = name.strip().lower().replace(" ", "-")
    wanted = _GPU_ALIASES.get(wanted, wanted)
    if wanted in GPUS:
        return GPUS[wanted]
    raise ConfigError(
        "gpu", f"must be one of {', '.join(GPUS)}; got {name!r}{_hint(wanted, tuple(GPUS))}"
    )


def _formats(names: str | None) -> list[KVFormat]:
    """The formats of a comma-separated list, each once; [] without one."""
    from kvmesh.kernels.formats.registry import format_names, get_format

    if names is None:
        return []
    found: dict[str, KVFormat] = {}
    for name in (part.strip() for part in names.split(",")):
        try:
            fmt = get_format(name)
        except ValueError:
            known = format_names()
            raise ConfigError(
                "kv_format",
                f"must be one of {', '.join(known)}; got {name!r}{_hint(name.lower(), known)}",
            ) from None
        found[fmt.name] = fmt
    return list(found.values())


def _hint(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _tokens(text: str) -> int:
    """131072, 128k or 1M; raises ConfigError naming `context`."""
    found = _TOKENS.fullmatch(text.strip())
    amount = Decimal(re.sub("[_,]", "", found[1])) * _UNITS[found[2].lower()] if found else None
    if amount is None or amount != int(amount) or not 1 <= amount <= MAX_TOKENS:
        raise ConfigError(
            "context",
            "must be a number of tokens, e.g. 131072, 128k (times 1024) or 1M (times 1024²), "
            f"up to {MAX_TOKENS:,}; got {text!r}",
        )
    return int(amount)


def _concurrency(count: int) -> int:
    if not 1 <= count <= MAX_CONCURRENCY:
        raise ConfigError("concurrency", f"must be from 1 to {MAX_CONCURRENCY:,}; got {count}")
    return count


def _page_size(size: int) -> int:
    if size not in PAGE_SIZES:
        raise ConfigError(
            "page_size", f"must be one of {', '.join(map(str, PAGE_SIZES))}; got {size}"
        )
    return size


def _weight_format(name: str) -> str:
    if name not in WEIGHT_FORMATS:
        raise ConfigError(
            "weight_format",
            f"must be one of {', '.join(WEIGHT_FORMATS)}; "
            f"got {name!r}{_hint(name, WEIGHT_FORMATS)}",
        )
    return name


def _share(share: float) -> float:
    if not 0 < share <= 1:
        raise ConfigError("gpu_memory_utilization", f"must be above 0 and up to 1; got {share}")
    return share
