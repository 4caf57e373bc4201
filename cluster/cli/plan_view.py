"""How plans are shown: tables for people, fields for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvmesh.cluster.cli.console import human_seconds, jsonable, notes, out
from kvmesh.workers.model.weight_coding import StoredWeights

if TYPE_CHECKING:
    from kvmesh.cluster.planner.model import PlannedModel
    from kvmesh.cluster.planner.plan import Plan, Target
    from kvmesh.cluster.simulator.hardware import Gpu

GIB = 1 << 30
_LEGEND = """weights, steps, KV: of a GPU; longest: tokens of one sequence (k, M: 1,024, 1,048,576);
at once: sequences of the wanted length, on all GPUs; TTFT, TPOT: modelled;
limit: of the context; †: needs calibration; ‡: not served by this version"""


def show(
    model: PlannedModel,
    gpu: Gpu,
    gpus: int,
    target: Target,
    plans: Sequence[Plan],
    best: Plan | None,
    *,
    every: bool,
) -> None:
    """best: the recommended plan; every: print all plans, not only its format and its layout"""
    counts, sizes = model.counts, model.sizes
    experts = f", of which a token uses {_billions(counts.multiplied)}" if counts.idle else ""
    heads = f"{sizes.kv_heads} KV heads of {sizes.head_dim}"
    if sizes.values_in_keys:
        heads = f"latents of {sizes.head_dim} channels"
    out.print(
        f"{escape(model.name)}: {_billions(counts.total)} weights{experts}; {sizes.layers} layers, "
        f"{heads}; context {model.max_model_len:,} tokens",
        soft_wrap=True,
    )
    at_once = "one sequence" if target.concurrency == 1 else f"{target.concurrency} sequences"
    weights = f"weights {target.weight_format}"
    if not StoredWeights.of(target.weight_format, model.config).is_coded:
        weights = "weights in bfloat16"
    out.print(f"{gpus} × {gpu.name}, {at_once} of {target.context:,} tokens, {weights}")
    shown = best or _closest(plans)
    if every:
        out.print(_table(plans, best, "layout", "KV format", "KV\nGiB", *_RESULTS))
    else:
        by_layout = [plan for plan in plans if plan.kv_format == shown.kv_format]
        by_format = [plan for plan in plans if plan.layout == shown.layout]
        out.print(f"\n{shown.kv_format}, by layout")
        out.print(_table(by_layout, best, "layout", *_MEMORY, *_RESULTS))
        out.print(f"{shown.layout}, by format")
        out.print(_table(by_format, best, "KV format", "bits", *_RESULTS))
    notes.print(f"[dim]{_LEGEND}[/dim]", soft_wrap=True)
    _show_best(model, target, best, shown)


def _show_best(model: PlannedModel, target: Target, best: Plan | None, shown: Plan) -> None:
    from kvmesh.cluster.planner.plan import serve_command

    if best is None:
        out.print(f"[bold]nothing fits[/bold]: {_why_not(target, shown)}", soft_wrap=True)
    elif best.is_served:
        out.print(f"[bold]{escape(serve_command(model, best, target))}[/bold]", soft_wrap=True)
    else:
        out.print(f"[bold]{best.kv_format} on {best.layout} would fit[/bold], but is not served:")
        for obstacle in best.obstacles:
            out.print(f"  {escape(obstacle)}", soft_wrap=True)


def _why_not(target: Target, closest: Plan) -> str:
    where = f"{closest.kv_format} on {closest.layout}"
    if closest.pool is None:
        return f"{where} leaves no KV memory; the limit is {closest.limit.value}"
    need = f"a sequence needs {closest.sequence_bytes / GIB:,.1f} GiB of KV"
    if closest.longest < target.context:
        return f"with {where} {need}, and the longest that fits has {closest.longest:,} tokens"
    return f"with {where} {need}, and {closest.sequences:,} fit at once"


def _closest(plans: Sequence[Plan]) -> Plan:
    """The plan with the most sequences, or else with the longest context."""
    return max(plans, key=lambda plan: (plan.sequences, plan.longest, plan.is_served))


def _table(plans: Sequence[Plan], best: Plan | None, *columns: str) -> Table:
    """columns: names of _COLUMNS"""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        right = name not in ("layout", "KV format", "limit")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for plan in plans:
        cells = (_COLUMNS[name](plan) for name in columns)
        table.add_row(*cells, style="bold" if plan is best else None)
    return table


_COLUMNS: Mapping[str, Callable[[Plan], str]] = {
    "layout": lambda plan: f"{plan.layout}{'' if plan.is_served else ' ‡'}",
    "KV format": lambda plan: f"{plan.kv_format}{' †' if plan.needs_calibration else ''}",
    "bits": lambda plan: f"{plan.bits:.2f}",
    "weights\nGiB": lambda plan: f"{plan.memory.weight_bytes / GIB:.1f}",
    "steps\nGiB": lambda plan: f"{plan.memory.step_bytes / GIB:.1f}",
    "KV\nGiB": lambda plan: f"{max(plan.memory.kv_bytes, 0) / GIB:.1f}",
    "longest": lambda plan: human_tokens(plan.longest),
    "at\nonce": lambda plan: f"{plan.sequences:,}",
    "TTFT": lambda plan: "–" if plan.ttft_s is None else _brief(plan.ttft_s),
    "TPOT": lambda plan: "–" if plan.tpot_s is None else _brief(plan.tpot_s),
    "limit": lambda plan: plan.limit.value,
}
_MEMORY = ("weights\nGiB", "steps\nGiB", "KV\nGiB")
_RESULTS = ("longest", "at\nonce", "TTFT", "TPOT", "limit")


def as_fields(
    model: PlannedModel,
    gpu: Gpu,
    gpus: int,
    target: Target,
    plans: Sequence[Plan],
    best: Plan | None,
) -> dict[str, Any]:
    """Everything, for programs; `recommended` is the index of a plan, or null."""
    from kvmesh.cluster.planner.plan import serve_command

    return {
        "model": {
            "name": model.name,
            "weights": model.counts.total,
            "weights_per_token": model.counts.multiplied,
            "max_model_len": model.max_model_len,
            "obstacle": model.obstacle,
        },
        "gpu": jsonable(gpu),
        "gpus": gpus,
        "target": jsonable(target),
        "plans": [_fields(plan) for plan in plans],
        "recommended": None if best is None else plans.index(best),
        "command": serve_command(model, best, target) if best and best.is_served else None,
    }


def _fields(plan: Plan) -> dict[str, Any]:
    fields: dict[str, Any] = jsonable(plan)
    fields["memory"]["kv_bytes"] = plan.memory.kv_bytes
    fields["is_served"] = plan.is_served
    return fields


def human_tokens(tokens: int) -> str:
    """871487 -> '851k', 1967935 -> '1.87M'; rounded down."""
    if tokens >= 1 << 20:
        return f"{math.floor(tokens / (1 << 20) * 100) / 100:.2f}M"
    return f"{tokens >> 10}k" if tokens >= 1 << 10 else str(tokens)


def _brief(seconds: float) -> str:
    """425 -> '7.1 min'."""
    return human_seconds(seconds) if seconds < 60 else f"{seconds / 60:,.1f} min"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion"
