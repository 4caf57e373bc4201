"""The progress of `kvmesh run`."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvmesh.cluster.batch.run import RunCounts
from kvmesh.cluster.cli import run_view
from kvmesh.cluster.cli.run_view import LINE_PERIOD_S, RunDisplay


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """To something that is no terminal."""
    file = io.StringIO()
    monkeypatch.setattr(run_view, "notes", Console(file=file, force_terminal=False, width=120))
    return file


def test_elsewhere_than_on_a_terminal_a_line_comes_from_time_to_time(
    written: io.StringIO,
) -> None:
    now = 1000.0
    with RunDisplay(clock=lambda: now) as display:
        for done in range(100):
            display.show(RunCounts(lines=100, answered=done, tokens=10 * done))
            now += LINE_PERIOD_S / 4
    lines = written.getvalue().splitlines()
    assert len(lines) == 24, "one in four, and none at first"
    assert "4 of 100 answered" in lines[0] and "4.0 tokens/s after 10" in lines[0]
