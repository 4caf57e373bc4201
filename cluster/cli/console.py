"""Output: results on stdout, errors and progress on stderr, readable numbers, JSON."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.text import Text


class ResultConsole(Console):
    """Raises BrokenPipeError like any other file, instead of exiting."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


class NoteConsole(Console):
    """Progress and hints, which `quiet` hides."""

    @property
    def is_terminal(self) -> bool:
        return not self.quiet and super().is_terminal


# Without emoji, which would replace a part of an address such as `127.0.0.1:1234: ...`.
out = ResultConsole(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)
notes = NoteConsole(stderr=True, highlight=False, emoji=False)


WORTH_A_LINE_S = 1.0


class RunningStep:
    """A step on a terminal: with how long it has taken when it is drawn, once that is long.

    started_s: of time.monotonic()
    """

    def __init__(self, step: str, detail: str, started_s: float) -> None:
        self._step, self._detail, self._started_s = step, detail, started_s

    def __rich__(self) -> Text:
        elapsed_s = time.monotonic() - self._started_s
        after = f" {human_wait(elapsed_s)}" if elapsed_s >= WORTH_A_LINE_S else ""
        return Text.assemble(self._step, (self._detail + after, "dim"))


class Steps:
    """Shows the progress of a long start: a spinner on a terminal, lines elsewhere.

    Each finished step has its duration; elsewhere only one that took a while.
    """

    def __init__(self) -> None:
        self._status: Status | None = None
        self._step = ""
        self._started_s = 0.0
        self._shown_share = -1

    def __enter__(self) -> Steps:
        if notes.is_terminal:
            self._status = notes.status("")
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()
        if self._status is not None:
            self._status.stop()

    def __call__(self, step: str, share: float | None) -> None:
        """step: its name, and after a comma a detail; share: the part that is done, if known"""
        name, _, detail = step.partition(", ")
        if name != self._step:
            self._finish()
            self._step, self._started_s, self._shown_share = name, time.monotonic(), -1
            if self._status is None:
                notes.print(f"  {escape(name)} …")
        elif self._status is None and share is not None:
            # In a log, one line per quarter instead of one per call.
            quarter = int(share * 4)
            if quarter > self._shown_share:
                self._shown_share = quarter
                notes.print(f"  {escape(name)}: {share:.0%} after {self._elapsed_s:.0f} s")
        if self._status is not None:
            extra = f" {share:.0%}" if share is not None else ""
            suffix = f" ({detail})" if detail else ""
            self._status.update(RunningStep(f"{name}{extra}", suffix, self._started_s))

    def _finish(self) -> None:
        if self._step and self._status is not None:
            notes.print(
                f"  [green]✓[/green] {escape(self._step)} [dim]{self._elapsed_s:.1f} s[/dim]"
            )
        elif self._step and self._elapsed_s >= WORTH_A_LINE_S:
            notes.print(f"  {escape(self._step)}: done in {self._elapsed_s:.1f} s")
        self._step = ""

    @property
    def _elapsed_s(self) -> float:
        """Since the current step began."""
        return time.monotonic() - self._started_s


def print_json(value: object) -> None:
    """Print a result for programs."""
    typer.echo(json.dumps(jsonable(value), indent=2))


def jsonable(value: object) -> Any:
    """A result as JSON has it; numbers that JSON does not have become null."""
    match value:
        case enum.Enum():
            return value.value
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): jsonable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [jsonable(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {x.name: jsonable(getattr(value, x.name)) for x in dataclasses.fields(value)}
    return value


def human_bytes(size_bytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """0.0123 -> '12 ms'."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def human_wait(seconds: float) -> str:
    """75.3 -> '1 min 15 s'; whole seconds, at least one."""
    minutes, rest = divmod(max(round(seconds), 1), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
