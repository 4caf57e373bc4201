"""How far `kvmesh run` is: a bar on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvmesh.cluster.batch.run import RunCounts
from kvmesh.cluster.cli.console import human_wait, notes

LINE_PERIOD_S = 10.0


class RunDisplay:
    """Begins with the first that is shown: what comes before has a display of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_s: float | None = None
        self._shown_s = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, counts: RunCounts) -> None:
        now = self._clock()
        if self._started_s is None:
            self._started_s = self._shown_s = now
            if notes.is_terminal:
                self._begin()
        details = _details(counts, now - self._started_s)
        if self._bar is not None:
            self._bar.update(
                self._task, total=counts.lines, completed=counts.done, description=details
            )
        elif now - self._shown_s >= LINE_PERIOD_S:
            self._shown_s = now
            after = human_wait(now - self._started_s)
            notes.print(f"  {progress_of(counts)}, {details} after {after}")

    def _begin(self) -> None:
        self._bar = Progress(
            TextColumn("answered"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.description}[/dim]"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=notes,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()


def _details(counts: RunCounts, elapsed_s: float) -> str:
    errors = f"{counts.failed:,} with errors, " if counts.failed else ""
    return f"{errors}{counts.tokens / max(elapsed_s, 1e-9):,.1f} tokens/s"


def progress_of(counts: RunCounts) -> str:
    of = "" if counts.lines is None else f" of {counts.lines:,}"
    return f"{counts.done:,}{of} answered"
