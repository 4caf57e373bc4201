"""Shows on a terminal why a stream has no output yet."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner

from kvmesh.client.types import Delta, Prefilling, Queued, Started, StreamEvent
from kvmesh.cluster.cli.console import human_wait


class WaitDisplay:
    """A line for the queue, then a bar for the prompt. Erased before the first output.

    Without a terminal it shows nothing. Waits in the middle of the output are not shown: the
    cursor stands in a line of text then.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("[dim]prompt[/dim]"),
            BarColumn(),
            TextColumn("[dim]{task.description}[/dim]"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=None)
        self._over = not console.is_terminal

    def __enter__(self) -> WaitDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def show(self, event: StreamEvent) -> None:
        """Call this with every event, before its output is printed."""
        if self._over:
            return
        match event:
            case Delta():
                self._end()
            case Queued():
                self._draw(Spinner("dots", f"[dim]{_queue_line(event)}[/dim]"))
            case Started() if self._live is not None:
                self._draw_prompt(Prefilling(0, 0, event.prompt_tokens))
            case Prefilling():
                self._draw_prompt(event)

    def _draw_prompt(self, event: Prefilling) -> None:
        self._progress.update(
            self._task,
            total=event.total_tokens,
            completed=event.computed_tokens,
            description=_prompt_line(event),
        )
        self._draw(self._progress)

    def _draw(self, content: RenderableType) -> None:
        if self._live is None:
            self._live = Live(content, console=self._console, transient=True)
            self._live.start()
        else:
            self._live.update(content)

    def _end(self) -> None:
        self._over = True
        if self._live is not None:
            self._live.stop()


def _queue_line(event: Queued) -> str:
    ahead = "next in line"
    if event.position:
        ahead = f"{event.position:,} request{'s' if event.position > 1 else ''} ahead"
    if event.projected_wait_s is None:
        return f"waiting for room: {ahead}"
    return f"waiting for room: {ahead}, about {human_wait(event.projected_wait_s)}"


def _prompt_line(event: Prefilling) -> str:
    cached = f" ({event.cached_tokens:,} cached)" if event.cached_tokens else ""
    return f"{event.computed_tokens:,} of {event.total_tokens:,} tokens{cached}"
