"""The options of `kvmesh bench serve`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer

DEFAULT_REQUESTS = 100
DEFAULT_CONCURRENCY = 8

_workload = functools.partial(typer.Option, rich_help_panel="Workload")
_load = functools.partial(typer.Option, rich_help_panel="Load")


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Which requests are sent."""

    workload: Annotated[
        str,
        _workload(
            help="random: lengths of --input and --output; sharegpt: lengths as ShareGPT's; a "
            "ShareGPT file (.json); a trace to replay: Mooncake's (.jsonl) or Azure's (.csv).",
        ),
    ] = "random"
    requests: Annotated[
        int | None,
        _workload(
            min=1,
            help=f"How many; default: {DEFAULT_REQUESTS}, or all of a trace.",
        ),
    ] = None
    input: Annotated[
        str,
        _workload(
            metavar="LENGTHS",
            help="Prompt tokens of random requests: N, uniform:LOW,HIGH, normal:MEAN,SD or "
            "lognormal:MEAN,SIGMA, the last two also with ,LOW,HIGH.",
        ),
    ] = "512"
    output: Annotated[
        str,
        _workload(
            metavar="LENGTHS",
            help="Output tokens of random requests, likewise.",
        ),
    ] = "128"
    prefix: Annotated[
        int,
        _workload(
            min=0,
            help="Tokens at the start of every prompt that are the same for all.",
        ),
    ] = 0
    scale: Annotated[
        float,
        _workload(help="Multiplies the lengths of a trace."),
    ] = 1.0
    words: Annotated[
        bool,
        _workload(
            "--words",
            help="Send frequent words instead of token ids; always so with --endpoint chat.",
        ),
    ] = False
    tokenizer: Annotated[
        str | None,
        _workload(
            metavar="MODEL",
            help="Counts the tokens of a ShareGPT file; default: the kvmesh server's own.",
        ),
    ] = None
    temperature: Annotated[float, _workload(help="0 is greedy.")] = 0.0
    stop_at_eos: Annotated[
        bool,
        _workload(
            "--stop-at-eos",
            help="Let outputs end where the model ends them; needed by servers without ignore_eos.",
        ),
    ] = False
    seed: Annotated[
        int,
        _workload(min=0, help="Of lengths, prompts and arrivals."),
    ] = 0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """When requests are sent, and to what."""

    rate: Annotated[
        float | None,
        _load(
            help="Requests a second, at random times, sent whether or not others have ended; "
            "inf: all at once.",
        ),
    ] = None
    burstiness: Annotated[
        float,
        _load(
            help="With --rate: 1 is a Poisson process, less comes in bursts, more is more even.",
        ),
    ] = 1.0
    concurrency: Annotated[
        int | None,
        _load(
            min=1,
            help="Requests at a time: one is sent when another has ended. Default, without --rate "
            f"or a trace: {DEFAULT_CONCURRENCY}.",
        ),
    ] = None
    speed: Annotated[
        float,
        _load(help="Replays a trace this many times as fast."),
    ] = 1.0
    warmup: Annotated[
        int,
        _load(min=0, help="Requests before the run, which do not count."),
    ] = 2
    openai: Annotated[
        str | None,
        _load(
            metavar="URL",
            help="Measure a server with OpenAI's API instead, e.g. http://localhost:8000/v1.",
        ),
    ] = None
    endpoint: Annotated[
        str,
        _load(help="With --openai: completions or chat."),
    ] = "completions"
    model: Annotated[
        str | None,
        _load(help="With --openai; default: the server's first."),
    ] = None

    @property
    def places(self) -> int:
        """Requests at a time, where they have no times of their own."""
        return self.concurrency or DEFAULT_CONCURRENCY

    def check(self) -> None:
        """Raises typer.BadParameter."""
        if self.rate is not None and self.concurrency is not None:
            raise typer.BadParameter("give one of --rate and --concurrency")
        if self.endpoint not in ("completions", "chat"):
            raise typer.BadParameter(
                f"must be completions or chat, got {self.endpoint!r}", param_hint="--endpoint"
            )


@contextlib.contextmanager
def as_option(name: str) -> Iterator[None]:
    """Report a ValueError as one of this option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name}") from None
