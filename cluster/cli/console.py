"""Output for people: progress, errors in one line, readable numbers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from kvmesh.client.errors import KVMeshError, UnavailableError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Steps:
    """Shows the progress of a long start: a spinner on a terminal, lines elsewhere.

    On a terminal, each finished step is printed with its duration.
    """

    def __init__(self) -> None:
        self._status: Status | None = None
        self._step = ""
        self._started_s = 0.0
        self._shown_share = -1

    def __enter__(self) -> Steps:
        if err.is_terminal:
            self._status = err.status("")
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
                err.print(f"  {escape(name)} …")
        elif self._status is None and share is not None:
            # In a log, one line per quarter instead of one per call.
            quarter = int(share * 4)
            if quarter > self._shown_share:
                self._shown_share = quarter
                err.print(f"  {escape(name)}: {share:.0%}")
        if self._status is not None:
            extra = f" {share:.0%}" if share is not None else ""
            suffix = f" [dim]({escape(detail)})[/dim]" if detail else ""
            self._status.update(f"{escape(name)}{extra}{suffix}")

    def _finish(self) -> None:
        if self._step and err.is_terminal:
            err.print(
                f"  [green]✓[/green] {escape(self._step)} "
                f"[dim]{time.monotonic() - self._started_s:.1f} s[/dim]"
            )
        self._step = ""


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Print typed errors as one line, and exit with EXIT_FAILURE."""
    try:
        yield
    except KVMeshError as error:
        fail(_client_line(error))
    except Exception as error:
        line = _server_line(error)
        if line is None:
            raise
        fail(line)


def fail(line: str, code: int = EXIT_FAILURE) -> None:
    err.print(f"[red]error:[/red] {escape(line)}", soft_wrap=True)
    raise typer.Exit(code)


def _client_line(error: KVMeshError) -> str:
    line = str(error)
    if isinstance(error, UnavailableError) and error.reason is None:
        return f"{line} (is `kvmesh serve` running there? use --target for another address)"
    if error.retry_after_s is not None:
        return f"{line} (try again in {error.retry_after_s:.1f} s)"
    return line


def _server_line(error: Exception) -> str | None:
    """The message of a server-side error that is meant for users; None for other errors."""
    from kvmesh.workers.errors import EngineError

    if isinstance(error, EngineError) or type(error).__name__ in ("StartError", "RayDiedError"):
        return str(error)
    return None


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
