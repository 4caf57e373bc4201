"""`kvmesh bench memory`: what sequences take by KV format, predicted and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cluster.cli.console import Steps, human_bytes, out, print_json
from kvmesh.cluster.cli.exits import errors_by_option
from kvmesh.cluster.cli.options import JsonOption, QuietOption, with_options

if TYPE_CHECKING:
    from kvmesh.kernels.formats.base import KVFormat
    from kvmesh.workers.evaluation.memory import MemoryFigure, PlannedMemory
    from kvmesh.workers.page_geometry import KVShape

DTYPES = {"float32": 4, "bfloat16": 2}
DEFAULT_FORMATS = "exact,int8,k4v4,k4v2,k2v2"


@dataclass(frozen=True, slots=True)
class MemorySubject:
    """The model whose memory is asked for.

    weight_bytes: in the compute dtype; itemsize: bytes of that dtype
    local: whether its weights are here, so that it can be measured
    """

    name: str
    shape: KVShape
    weight_bytes: int
    itemsize: int
    local: bool


@with_options
def bench_memory(
    model: Annotated[
        str | None,
        typer.Option(
            help="As in `serve`; or, for a prediction alone, a config.json or the name of a "
            "model of `kvmesh simulate`, e.g. llama-3-8b or internlm-chat-7b.",
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="N[,N…]", help="Sequences that run at a time.")
    ] = "8,16,32,48",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each, with its output.")] = 2048,
    kv_format: Annotated[
        str, typer.Option(metavar="F[,F…]", help="KV formats; see `kvmesh formats`.")
    ] = DEFAULT_FORMATS,
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 64,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share the KV heads.")] = 1,
    step_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a step (engine.max_num_batched_tokens).")
    ] = 512,
    dtype: Annotated[
        str,
        typer.Option(help="float32 or bfloat16; auto: as `serve` here, or bfloat16 if predicted."),
    ] = "auto",
    predict: Annotated[
        bool, typer.Option("--predict", help="Do not load the model, nor measure.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show the memory of sequences by KV format: predicted, and measured on this device.

    The prediction is the engine's own arithmetic. The measurement allocates the same pool in this
    process, without Ray, and looks at how much it holds then.
    """
    from kvmesh.workers.evaluation.memory import predict as predicted

    with errors_by_option():
        formats, batches = _formats(kv_format), _batches(batch)
        subject = _subject(model, dtype, predict, page_size)
        _check_tp(subject, tp)
        with _format_errors():
            plans = list(
                predicted(
                    subject.shape,
                    subject.weight_bytes,
                    formats,
                    batches,
                    tokens,
                    itemsize=subject.itemsize,
                    page_size=page_size,
                    tp=tp,
                    max_num_batched_tokens=step_tokens,
                )
            )
        measures = subject.local and not predict and tp == 1
        figures = (
            _measured(plans, model, dtype, page_size) if measures else [x.figure for x in plans]
        )
    if as_json:
        print_json({"model": subject.name, "weight_bytes": subject.weight_bytes,
                    "tp": tp, "page_size": page_size, "figures": figures})  # fmt: skip
        return
    _show(subject, figures, tp, page_size)
    if not measures and not predict:
        why = "with --tp 1 alone" if subject.local else "where the model's weights are"
        out.print(f"[dim]measured {why}[/dim]")


def _formats(names: str) -> list[KVFormat]:
    from kvmesh.kernels.formats.registry import get_format
    from kvmesh.workers.errors import ConfigError

    try:
        found = [get_format(name) for name in names.split(",") if name.strip()]
    except ValueError as error:
        raise ConfigError("kv_format", str(error).removeprefix("kv format: ")) from None
    if not found:
        raise ConfigError("kv_format", "must name a format")
    return list(dict.fromkeys(found))


def _batches(text: str) -> list[int]:
    from kvmesh.workers.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(
            "batch", f"must be whole numbers from 1, separated by commas; got {text!r}"
        )
    return [int(part) for part in parts]


def _subject(model: str | None, dtype: str, predict: bool, page_size: int) -> MemorySubject:
    from kvmesh.cluster.config import DEFAULT_MODEL
    from kvmesh.cluster.simulator.hardware import MODELS, model_shape
    from kvmesh.workers.config import EngineConfig
    from kvmesh.workers.errors import ConfigError
    from kvmesh.workers.model.facts import read_facts
    from kvmesh.workers.model.source import resolve_model
    from kvmesh.workers.page_geometry import KVShape

    name = model or DEFAULT_MODEL
    EngineConfig.model_validate({"model": name, "dtype": dtype, "page_size": page_size})
    if name in MODELS or name.endswith("config.json"):
        try:
            known = model_shape(name)
        except ValueError as error:
            raise ConfigError("model", str(error)) from None
        itemsize = DTYPES.get(dtype, DTYPES["bfloat16"])
        shape = known.kv
        weights = int((known.params + known.idle_params) * itemsize)
        return MemorySubject(known.name, shape, weights, itemsize, local=False)
    with Steps() as steps:
        files = resolve_model(name, progress=steps)
    facts = read_facts(files.path)
    if dtype == "auto":
        dtype = "bfloat16" if predict else _dtype_here()
    itemsize = DTYPES[dtype]
    stored = {"float32": 4}.get(facts.dtype, 2)
    shape = KVShape.of(facts)
    weights = facts.weight_bytes // stored * itemsize
    return MemorySubject(files.name, shape, weights, itemsize, local=True)


def _dtype_here() -> str:
    """What `serve` computes in on this machine."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def _check_tp(subject: MemorySubject, tp: int) -> None:
    from kvmesh.workers.errors import ConfigError

    heads = subject.shape.num_kv_heads
    if heads % tp:
        raise ConfigError("tp", f"must divide the model's {heads} KV heads; got {tp}")


@contextmanager
def _format_errors() -> Iterator[None]:
    from kvmesh.workers.errors import ConfigError

    try:
        yield
    except ValueError as error:
        raise ConfigError("kv_format", str(error)) from None


def _measured(
    plans: list[PlannedMemory], model: str | None, dtype: str, page_size: int
) -> list[MemoryFigure]:
    from kvmesh.cluster.config import DEFAULT_MODEL
    from kvmesh.workers.config import EngineConfig
    from kvmesh.workers.evaluation.pool_memory import PoolMeter

    figures = []
    with Steps() as steps:
        steps("loading the model", None)
        config = EngineConfig.model_validate(
            {"model": model or DEFAULT_MODEL, "dtype": dtype, "page_size": page_size}
        )
        meter = PoolMeter(config, steps)
        for number, planned in enumerate(plans):
            steps("allocating pools", number / len(plans))
            # Without its parameters, a calibrated format has pages, but no engine.
            measured = None if planned.fmt.needs_calibration else meter.measure(planned)
            figures.append(dataclasses.replace(planned.figure, measured=measured))
    return figures


def _show(subject: MemorySubject, figures: list[MemoryFigure], tp: int, page_size: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    ranks = f", {tp} ranks" if tp > 1 else ""
    out.print(
        f"[bold]{subject.name}[/bold]{ranks}: weights {human_bytes(subject.weight_bytes)}, "
        f"{subject.itemsize * 8}-bit; sequences of {figures[0].tokens:,} tokens, pages of "
        f"{page_size}",
        soft_wrap=True,
    )
    measured = any(figure.measured for figure in figures)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("KV format", no_wrap=True)
    names = ["batch", "MiB a\nsequence", "KV pool,\nMiB", "with\nweights"]
    names += ["KV pool,\nmeasured", "process,\nmeasured"] if measured else []
    for name in names:
        table.add_column(name, justify="right")
    for place, figure in enumerate(figures):
        first = place == 0 or figures[place - 1].kv_format != figure.kv_format
        if first and place:
            table.add_section()
        row = [
            str(figure.sequences),
            _mib(figure.sequence_bytes, 1) if first else "",
            _mib(figure.pool_bytes),
            _mib(figure.total_bytes),
        ]
        if measured and figure.measured:
            row += [_mib(figure.measured.pool_bytes), _mib(figure.measured.process_bytes)]
        elif measured:
            row += ["–", "–"]
        table.add_row(figure.kv_format if first else "", *row)
    out.print(table)
    words = ["KV pool: what all sequences hold at their end, and the tokens of a step"]
    if measured and not all(figure.measured for figure in figures):
        words.append("–: no room for it here now, or the format needs calibration")
    out.print("[dim]" + "\n".join(words) + "[/dim]")


def _mib(num_bytes: int, digits: int = 0) -> str:
    return f"{num_bytes / 2**20:,.{digits}f}"
