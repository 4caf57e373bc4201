"""`kvmesh top`."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cluster.cli.console import out
from kvmesh.cluster.cli.options import QuietOption, ServerOptions, with_options

if TYPE_CHECKING:
    from kvmesh.client import Client
    from kvmesh.cluster.cli.top_view import Picture

# Lines of the screen that are not requests or groups.
FRAME_LINES = 7


@with_options
def top(
    connection: ServerOptions,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, help="Seconds between two pictures.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture, with rates over an interval.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Watch the groups, pools, queue and longest-running requests; Ctrl-C ends it.

    Needs an admin key. Bars: in use, then cached, then free. first: time to the first token; each:
    per further token (medians). in/s, out/s: tokens of prompts and of output.
    """
    from kvmesh.cluster.cli.top_view import fleet

    with connection.client() as client:
        before = _picture(client, client.model_info().model)
        time.sleep(interval)
        if once or not out.is_terminal:
            now = _picture(client, before.model)
            out.print(fleet(now, before, max_requests=sum(len(g.oldest) for g in now.loads.groups)))
            return
        try:
            _watch(client, before, interval)
        except KeyboardInterrupt:
            pass


def _watch(client: Client, before: Picture, interval: float) -> None:
    from rich.live import Live

    from kvmesh.client.errors import UnavailableError
    from kvmesh.cluster.cli.top_view import fleet

    now = before
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            note = ""
            try:
                before, now = now, _picture(client, now.model)
            except UnavailableError as error:
                note = str(error)
            lines = out.size.height - FRAME_LINES - len(now.loads.groups)
            live.update(fleet(now, before, max(lines, 0), note), refresh=True)
            time.sleep(interval)


def _picture(client: Client, model: str) -> Picture:
    from kvmesh.cluster.cli.top_view import Picture

    return Picture(client.loads(), model, time.monotonic(), datetime.now())
