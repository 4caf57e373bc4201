"""`kvmesh simulate`: runs a trace on a simulated fleet."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.simulator.hardware import GPUS, MODELS
from kvmesh.cluster.simulator.metrics import Objective, Summary, summarize
from kvmesh.cluster.simulator.policies import POLICIES
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.simulation import Scenario, simulate
from kvmesh.cluster.simulator.trace import (
    FORMATS,
    TraceRequest,
    at_rate,
    inject_long,
    read_trace,
    with_tenants,
)
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.errors import ConfigError

app = typer.Typer(help="Simulate a fleet on a trace, with the router's own code.")

QUEUE_LIMIT = 1_000_000  # the other systems' queues are unbounded


@app.command("simulate")
def simulate_command(
    trace: Annotated[Path, typer.Option(help="Trace file.", exists=True, dir_okay=False)],
    trace_format: Annotated[
        str | None, typer.Option(help=f"{' or '.join(FORMATS)}; by default from the file's name.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Groups of the fleet.", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help=", ".join(GPUS))] = "h100",
    gpus_per_group: Annotated[int, typer.Option(help="GPUs of one group.", min=1)] = 1,
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "llama-3-8b",
    kv_format: Annotated[
        str,
        typer.Option(help="Format of sealed pages. Groups take turns in a comma-separated list."),
    ] = "exact",
    policy: Annotated[
        str, typer.Option(help=f"Comma-separated, or `all`: {', '.join(POLICIES)}.")
    ] = "kvmesh",
    rate: Annotated[float, typer.Option(help="Arrivals are this many times as fast.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Use only the first N requests.", min=1)] = None,
    inject: Annotated[
        str | None,
        typer.Option(
            "--inject-long",
            metavar="N@TOKENS",
            help="Add N prompts of TOKENS tokens, evenly spaced.",
        ),
    ] = None,
    tenants: Annotated[
        int, typer.Option(help="Divide conversations among this many tenants.", min=1)
    ] = 1,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Output that requests allow; by default the trace's longest."),
    ] = None,
    ttft: Annotated[float, typer.Option(help="Objective: seconds to the first token.")] = 2.0,
    ttft_stretch: Annotated[
        float, typer.Option(help="... or this many times that of an idle engine.")
    ] = 5.0,
    tpot: Annotated[float, typer.Option(help="Objective: seconds per further token.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the random policies.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file.")] = None,
) -> None:
    """Run a trace through one or several placement policies and compare them."""
    try:
        requests = _requests(trace, trace_format, rate, limit, inject, tenants)
        shapes = _shapes(gpu, gpus_per_group, model, kv_format, groups)
        policies = POLICIES if policy == "all" else tuple(policy.split(","))
        scenario = Scenario(
            shapes=shapes,
            requests=requests,
            max_tokens=max_tokens or max(request.output_tokens for request in requests),
            router=RouterConfig(queue_limit=QUEUE_LIMIT),
            seed=seed,
        )
        runs = [simulate(scenario, name) for name in policies]
    except (ValueError, ConfigError) as error:
        raise typer.BadParameter(str(error)) from error
    objective = Objective(ttft, ttft_stretch, tpot)
    service, chunk = ServiceTime.of(shapes[0]), shapes[0].max_num_batched_tokens
    summaries = [summarize(run, service, chunk, objective) for run in runs]
    _show(summaries, as_json)
    if plot is not None:
        from kvmesh.cluster.simulator.plots import plot_runs  # matplotlib is slow to import

        plot_runs(runs, plot)


def _requests(
    trace: Path,
    trace_format: str | None,
    rate: float,
    limit: int | None,
    inject: str | None,
    tenants: int,
) -> list[TraceRequest]:
    requests = at_rate(read_trace(trace, trace_format), rate)[:limit]
    if tenants > 1:
        requests = with_tenants(requests, tenants)
    if inject is None:
        return requests
    count, at, tokens = inject.partition("@")
    if not (at and count.isdigit() and tokens.isdigit()):
        raise ValueError(f"inject-long must be N@TOKENS, got {inject!r}")
    return inject_long(requests, int(count), int(tokens))


def _shapes(
    gpu: str, gpus_per_group: int, model: str, kv_format: str, groups: int
) -> list[EngineShape]:
    for name, value, known in (("gpu", gpu, list(GPUS)), ("model", model, list(MODELS))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    formats = [get_format(name) for name in kv_format.split(",")]
    return [
        EngineShape(GPUS[gpu], MODELS[model], formats[index % len(formats)], gpus_per_group)
        for index in range(groups)
    ]


def _show(summaries: list[Summary], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(summary) for summary in summaries], indent=2))
        return
    table = Table(title="goodput: requests per second within the objective; times in seconds")
    for column in (
        "policy", "goodput", "share", "TTFT p50", "p90", "p99", "TPOT p50", "p99",
        "e2e p99", "preempted", "hit", "KV used", "fairness", "refused", "long TTFT",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "policy" else "right")
    for x in summaries:
        table.add_row(
            x.policy,
            f"{x.goodput_rps:.2f}",
            f"{x.attainment:.1%}",
            *(f"{x.ttft_s[name]:.2f}" for name in ("p50", "p90", "p99")),
            *(f"{x.tpot_s[name]:.3f}" for name in ("p50", "p99")),
            f"{x.e2e_s['p99']:.1f}",
            str(x.preemptions),
            f"{x.prefix_hit_share:.1%}",
            f"{x.kv_used_share:.0%}",
            f"{x.fairness:.3f}",
            str(x.refused),
            " ".join(f"{seconds:.0f}" for seconds in x.long_ttft_s) or "-",
        )
    Console(width=160).print(table)
