"""`kvmesh simulate`: runs a trace on a simulated fleet."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.cluster.routing.autoscaling import AutoscalingPolicy
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.simulator.hardware import GPUS, MODELS, model_shape
from kvmesh.cluster.simulator.metrics import Objective, Summary, summarize
from kvmesh.cluster.simulator.policies import OWN, POLICIES
from kvmesh.cluster.simulator.scaling import Autoscaling
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.simulation import Run, Scenario, simulate
from kvmesh.cluster.simulator.synthetic import FAMILIES, synthetic_trace, workload_of
from kvmesh.cluster.simulator.trace import (
    FORMATS,
    TraceRequest,
    at_rate,
    inject_long,
    read_trace,
    with_tenants,
    with_tide,
)
from kvmesh.kernels.formats.registry import get_format

app = typer.Typer(help="Simulate a fleet on a trace, with the router's own code.")

QUEUE_LIMIT = 1_000_000  # the other systems' queues are unbounded
SYNTHETIC = "synthetic:"
SYNTHETIC_REQUESTS = 1000
WIDTH = 80


@app.command("simulate")
def simulate_command(
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE|synthetic:FAMILY",
            help=f"A trace file, or a made-up trace: {', '.join(FAMILIES)}.",
        ),
    ] = f"{SYNTHETIC}prefill-bursty-shared",
    trace_format: Annotated[
        str | None, typer.Option(help=f"{' or '.join(FORMATS)}; by default from the file's name.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Groups of the fleet.", min=1)] = 8,
    gpu: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(GPUS)}; by default what a made-up trace suits, else h100."),
    ] = None,
    gpus_per_group: Annotated[int, typer.Option(help="GPUs of one group.", min=1)] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A model's directory or config.json, or one of {', '.join(MODELS)}; by default "
            "llama-3-8b."
        ),
    ] = None,
    kv_format: Annotated[
        str | None,
        typer.Option(
            help="Format of sealed pages; groups take turns in a comma-separated list. By default "
            "what a made-up trace suits, else exact."
        ),
    ] = None,
    max_step: Annotated[
        float, typer.Option(help="Seconds that a step may take while sequences decode.", min=0.0)
    ] = 0.1,
    policy: Annotated[
        str, typer.Option(help=f"Comma-separated, or `all`: {', '.join(POLICIES)}.")
    ] = "kvmesh",
    rate: Annotated[float, typer.Option(help="Arrivals are this many times as fast.")] = 1.0,
    limit: Annotated[
        int | None,
        typer.Option(help="Use only the first N requests; of made-up ones 1,000.", min=1),
    ] = None,
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
    seed: Annotated[int, typer.Option(help="Seed of made-up traces and random policies.")] = 0,
    autoscale: Annotated[
        int | None,
        typer.Option(
            metavar="MIN",
            help="Run kvmesh's policies again with MIN groups, to which others are added as the "
            "load asks for them.",
            min=1,
        ),
    ] = None,
    group_start: Annotated[
        float, typer.Option(help="Seconds that a group takes to start.", min=0.0)
    ] = 60.0,
    down_after: Annotated[
        float,
        typer.Option(help="Seconds after which a group is removed that is not needed.", min=0.0),
    ] = 300.0,
    tide: Annotated[
        str | None,
        typer.Option(
            metavar="SWING@SECONDS",
            help="Let the rate of arrivals rise and fall by SWING (0 to 1) with this period.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures, as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file.")] = None,
) -> None:
    """Run a trace through one or several placement policies and compare them."""
    requests = _requests(trace, trace_format, limit, seed, groups)
    requests = _changed(requests, rate, tide, inject, tenants)
    shapes = _shapes(trace, gpu, gpus_per_group, model, kv_format, max_step, groups)
    scenario = Scenario(
        shapes=shapes,
        requests=requests,
        max_tokens=max_tokens or max(request.output_tokens for request in requests),
        router=RouterConfig(queue_limit=QUEUE_LIMIT),
        seed=seed,
    )
    names = _policies(policy)
    runs = [simulate(scenario, name) for name in names]
    if autoscale is not None:
        scaling = Autoscaling(AutoscalingPolicy(autoscale, down_after_s=down_after), group_start)
        scaled = dataclasses.replace(scenario, scaling=scaling)
        for run in (simulate(scaled, name) for name in names if name in OWN):
            runs.append(dataclasses.replace(run, policy=f"{run.policy} {autoscale}-{groups}"))
    objective = Objective(ttft, ttft_stretch, tpot)
    service, chunk = ServiceTime.of(shapes[0]), shapes[0].max_num_batched_tokens
    summaries = [summarize(run, service, chunk, objective) for run in runs]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(summary) for summary in summaries], indent=2))
    else:
        _show(summaries, groups, injected=inject is not None, tenants=tenants)
    if plot is not None:
        _plot(runs, plot)


def _requests(
    trace: str, trace_format: str | None, limit: int | None, seed: int, groups: int
) -> list[TraceRequest]:
    if trace.startswith(SYNTHETIC):
        family = trace.removeprefix(SYNTHETIC)
        return synthetic_trace(family, limit or SYNTHETIC_REQUESTS, seed, groups)
    return read_trace(Path(trace), trace_format)[:limit]


def _changed(
    requests: list[TraceRequest],
    rate: float,
    tide: str | None,
    inject: str | None,
    tenants: int,
) -> list[TraceRequest]:
    requests = at_rate(requests, rate)
    if tide is not None:
        try:
            swing, period_s = map(float, tide.split("@"))
        except ValueError:
            raise ValueError(f"tide must be SWING@SECONDS, got {tide!r}") from None
        requests = with_tide(requests, period_s, swing)
    if tenants > 1:
        requests = with_tenants(requests, tenants)
    if inject is None:
        return requests
    count, at, tokens = inject.partition("@")
    if not (at and count.isdigit() and tokens.isdigit()):
        raise ValueError(f"inject-long must be N@TOKENS, got {inject!r}")
    return inject_long(requests, int(count), int(tokens))


def _shapes(
    trace: str,
    gpu: str | None,
    gpus_per_group: int,
    model: str | None,
    kv_format: str | None,
    max_step_s: float,
    groups: int,
) -> list[EngineShape]:
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    shape = EngineShape(GPUS["h100"], MODELS["llama-3-8b"], get_format("exact"))
    if trace.startswith(SYNTHETIC):
        shape = workload_of(trace.removeprefix(SYNTHETIC)).shape
    shape = dataclasses.replace(
        shape,
        gpu=GPUS[gpu] if gpu else shape.gpu,
        model=model_shape(model) if model else shape.model,
        gpus=gpus_per_group,
        max_step_s=max_step_s,
    )
    formats = [get_format(name) for name in kv_format.split(",")] if kv_format else []
    formats = formats or [shape.kv_format]
    return [
        dataclasses.replace(shape, kv_format=formats[index % len(formats)])
        for index in range(groups)
    ]


def _policies(names: str) -> tuple[str, ...]:
    return POLICIES if names == "all" else tuple(names.split(","))


def _show(summaries: list[Summary], groups: int, *, injected: bool, tenants: int) -> None:
    table = Table(
        title="goodput: requests per second within the objective; times in seconds",
        box=None,
        padding=(0, 1, 0, 0),
    )
    columns = ["policy", "goodput", "share", "TTFT p50", "p90", "p99", "TPOT p99"]
    columns += ["hits", "KV", "preempted"]
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for x in summaries:
        table.add_row(
            x.policy,
            f"{x.goodput_rps:.2f}",
            f"{x.attainment:.1%}",
            *(f"{x.ttft_s[name]:.2f}" for name in ("p50", "p90", "p99")),
            f"{x.tpot_s['p99']:.3f}",
            f"{x.prefix_hit_share:.0%}",
            f"{x.kv_used_share:.0%}",
            str(x.preemptions),
        )
    console = Console(width=WIDTH)
    console.print(table)
    for x in summaries:
        more = []
        if (share := x.group_s / (groups * x.makespan_s)) < 1.0 - 1e-9:
            more.append(f"groups ran for {x.group_s:,.0f} s in all, {share:.0%} of those of all")
        if x.refused:
            more.append(f"{x.refused} requests fit no group")
        if tenants > 1:
            more.append(f"fairness between tenants {x.fairness:.3f}")
        if injected:
            seconds = " ".join(f"{at:.0f}" for at in x.long_ttft_s)
            more.append(f"TTFT of the long prompts {seconds}")
        if more:
            console.print(f"{x.policy}: {', '.join(more)}", highlight=False)


def _plot(runs: list[Run], path: Path) -> None:
    from kvmesh.cluster.simulator.plots import plot_runs  # matplotlib is slow to import

    plot_runs(runs, path)
