"""`kvmesh bench serve`: latency and throughput of a running server, under a chosen load."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cluster.cli.bench_options import LoadOptions, WorkloadOptions, as_option
from kvmesh.cluster.cli.console import jsonable, notes, print_json
from kvmesh.cluster.cli.exits import CommandFailed, ExitCode
from kvmesh.cluster.cli.options import JsonOption, QuietOption, ServerOptions, with_options
from kvmesh.cluster.cli.plots import plotter
from kvmesh.cluster.version import package_version

if TYPE_CHECKING:
    from kvmesh.cluster.bench.load import LoadRun
    from kvmesh.cluster.bench.workload import BenchRequest
    from kvmesh.cluster.cli.bench_setup import BenchServer

LOOK_S = 0.2
LINE_S = 10.0  # between lines of progress, without a terminal
# Added to the numbers of requests that warm a server up, so that their prompts are others.
WARM_UP_NUMBER = 1 << 40


@with_options
def bench_serve(
    connection: ServerOptions,
    workload: WorkloadOptions,
    load: LoadOptions,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MEASURE:MS",
            help="Count the requests that meet these, e.g. --goodput ttft:500 tpot:50; "
            "measures are ttft, tpot and e2e.",
        ),
    ] = None,
    objectives: Annotated[
        list[str] | None, typer.Argument(metavar="[MEASURE:MS]...", help="More for --goodput.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Plot the run to this file.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a running server: latencies, throughput, goodput.

    Latencies count from when a request is due, also if the server is too busy to take it.
    Ctrl-C ends the run and shows what there is.
    """
    from kvmesh.cluster.bench.report import read_objectives, report_of
    from kvmesh.cluster.cli.bench_view import show_load

    if objectives and not goodput:
        raise typer.BadParameter(f"unexpected argument {objectives[0]!r}: --goodput comes first")
    with as_option("goodput"):
        limits = read_objectives([*(goodput or ()), *(objectives or ())])
    draw = None if png is None else plotter(png, "--png", "bench_plot", "plot_load")
    load.check()
    server, run, planned = asyncio.run(_bench(connection, workload, load))
    report = report_of(run.records, run.ended_s, limits)
    if as_json:
        conditions = {
            "kvmesh": package_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "server": server,
            "workload": workload,
            "load": load,
        }
        print_json({"conditions": jsonable(conditions), **jsonable(report)})
    else:
        show_load(report, server, planned)
    if draw is not None:
        draw(run.records, report, server)
    if run.stopped:
        raise typer.Exit(ExitCode.INTERRUPTED)
    if not report.complete:
        raise CommandFailed("no request got a complete reply")


async def _bench(
    connection: ServerOptions, workload: WorkloadOptions, load: LoadOptions
) -> tuple[str, LoadRun, int]:
    """What was measured, the run, and how many requests were planned."""
    from kvmesh.cluster.bench.load import LoadRun
    from kvmesh.cluster.cli.bench_setup import connected, requests_of

    async with connected(connection, workload, load) as server:
        requests = await requests_of(workload, load, server.count_tokens)
        await _warm_up(server, requests[: load.warmup])
        places = None if requests[0].arrival_s is not None else load.places
        run = LoadRun(server.target, server.prompts, places)
        with _stopped_by_signals(run):
            watching = asyncio.create_task(_watch(run, len(requests)))
            try:
                await run.run(requests)
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
        return server.target.name, run, len(requests)


async def _warm_up(server: BenchServer, requests: Sequence[BenchRequest]) -> None:
    """Send requests like these, with other prompts, before the clock starts.

    Raises CommandFailed if all fail.
    """
    from kvmesh.cluster.bench.load import LoadRun

    if not requests:
        return
    notes.print(f"warming up with {len(requests)} requests", highlight=False)
    run = LoadRun(server.target, server.prompts, len(requests))
    with _stopped_by_signals(run):
        await run.run(
            [
                dataclasses.replace(
                    x, number=x.number + WARM_UP_NUMBER, arrival_s=None, blocks=(), text=None
                )
                for x in requests
            ]
        )
    if run.stopped:
        raise typer.Exit(ExitCode.INTERRUPTED)
    failures = [record.error for record in run.records if record.error is not None]
    if len(failures) == len(requests):
        raise CommandFailed(f"the server does not reply: {failures[0]} ({failures[0].kind})")


@contextlib.contextmanager
def _stopped_by_signals(run: LoadRun) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM stops the run; the second ends the program."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
        run.stop()

    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _watch(run: LoadRun, planned: int) -> None:
    """Show how far the run is: a bar on a terminal, a line at times elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.description}[/dim]"),
        TimeElapsedColumn(),
    )
    shown_s = 0.0
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("", total=planned)
        while True:
            await asyncio.sleep(LOOK_S)
            ended = sum(record.ended_s is not None for record in run.records)
            failed = sum(record.error is not None for record in run.records)
            words = f"{len(run.records) - ended} running"
            words += f", {failed} failed" if failed else ""
            bar.update(task, completed=ended, description=words)
            shown_s += LOOK_S
            if not notes.is_terminal and shown_s >= LINE_S:
                shown_s = 0.0
                notes.print(f"  {ended} of {planned} requests ended, {words}")
