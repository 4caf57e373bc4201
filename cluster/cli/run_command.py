"""`kvmesh run`: a file of requests, answered into another."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cluster.cli.console import Steps, err, notes
from kvmesh.cluster.cli.exits import CommandFailed, ExitCode
from kvmesh.cluster.cli.options import QuietOption, with_options
from kvmesh.cluster.cli.settings_options import ModelSettings

if TYPE_CHECKING:
    from kvmesh.cluster.batch.output_file import OutputFile
    from kvmesh.cluster.batch.run import BatchRun
    from kvmesh.cluster.config import ClusterConfig

SERVED_AT_ONCE = 64


@with_options
def run(
    settings: ModelSettings,
    source: Annotated[
        str,
        typer.Option("--input", "-i", metavar="FILE", help="Requests, a line each; - is stdin."),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Answers, a line each, as they come; - is stdout.",
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Have a server answer, over OpenAI's API, instead of an engine in this process.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="With --address: a file with the key, of mode 0600; default: $KVMESH_API_KEY, or "
            "the local server's key."
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Requests at a time; default: twice what the engine runs, or 64."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    A run that was interrupted, even by kill -9, continues where it stopped when the same command
    is run again. Lines that are wrong are answered with errors, and the exit code is then 1.
    """
    if address is not None and settings.given:
        raise typer.BadParameter("--address has a server answer, with that server's settings")
    from kvmesh.cluster.batch.errors import BatchRunError
    from kvmesh.cluster.batch.output_file import OutputFile
    from kvmesh.cluster.batch.run import BatchRun
    from kvmesh.cluster.cli.run_view import RunDisplay, progress_of

    config = None if address is not None else settings.load().config
    _check_different(source, output)
    counts, started = None, False
    try:
        with contextlib.closing(OutputFile(output)) as target, RunDisplay() as display:
            batch = BatchRun(source, target, display.show)
            counts = batch.counts
            batch.survey()
            started = True
            if counts.before:
                notes.print(f"  {progress_of(counts)} already")
            if counts.before != counts.lines:
                asyncio.run(_answer(batch, target, config, address, api_key_file, at_once))
    except BatchRunError as error:
        left = f" ({progress_of(counts)}; run it again to continue)" if counts and started else ""
        code = ExitCode.UNREACHABLE if error.unreachable else ExitCode.FAILED
        raise CommandFailed(f"{error}{left}", code) from None
    except KeyboardInterrupt:
        done = "" if counts is None else f": {progress_of(counts)}; run it again to continue"
        err.print(f"interrupted{done}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    notes.print(f"  {progress_of(counts)} in {output}", markup=False, soft_wrap=True)
    if counts.failed:
        raise CommandFailed(f"{counts.failed:,} of {counts.done:,} answers are errors")


def _check_different(source: str, output: str) -> None:
    """Raises BadParameter if the output would be written over the input."""
    with contextlib.suppress(OSError):
        if source != "-" and output != "-" and os.path.samefile(source, output):
            raise typer.BadParameter("is the input", param_hint="--output")


async def _answer(
    batch: BatchRun,
    target: OutputFile,
    config: ClusterConfig | None,
    address: str | None,
    api_key_file: Path | None,
    at_once: int | None,
) -> None:
    from kvmesh.cluster.offline.loop_thread import DaemonThreads

    # A read of stdin, or a model that loads, keeps nobody from interrupting.
    asyncio.get_running_loop().set_default_executor(DaemonThreads())
    if config is None:
        assert address is not None
        await _answer_served(batch, target, address, api_key_file, at_once)
    else:
        await _answer_here(batch, target, config, at_once)


async def _answer_here(
    batch: BatchRun, target: OutputFile, config: ClusterConfig, at_once: int | None
) -> None:
    from kvmesh.cluster.batch.local_answers import LocalAnswers
    from kvmesh.cluster.batch.run import check_model
    from kvmesh.cluster.offline.local_cluster import LocalCluster

    with Steps() as steps:
        cluster = LocalCluster(config, steps)
        await cluster.start()
    try:
        check_model(target, [cluster.info.model])
        await batch.run(LocalAnswers(cluster), at_once or 2 * cluster.info.max_num_seqs)
    finally:
        await cluster.stop()


async def _answer_served(
    batch: BatchRun,
    target: OutputFile,
    address: str,
    api_key_file: Path | None,
    at_once: int | None,
) -> None:
    from urllib.parse import urlsplit

    from kvmesh.client.credentials import read_key_file, resolve_api_key
    from kvmesh.cluster.batch.run import check_model
    from kvmesh.cluster.batch.served_answers import ServedAnswers, base_url

    base = base_url(address)
    key = None if api_key_file is None else read_key_file(api_key_file)
    if api_key_file is not None and key is None:
        raise typer.BadParameter(f"there is no file {api_key_file}", param_hint="--api-key-file")
    key = key or resolve_api_key(None, urlsplit(base).hostname or "", os.environ)
    async with ServedAnswers(base, key) as answers:
        check_model(target, await answers.models())
        await batch.run(answers, at_once or SERVED_AT_ONCE)
