"""The progress of a long start, on a terminal."""

from __future__ import annotations

import time

import pytest
from rich.console import Console

from kvmesh.cluster.cli.console import RunningStep


@pytest.mark.parametrize(("age_s", "expected"), [(0.2, ""), (75.0, " 1 min 15 s")])
def test_a_step_that_takes_long_says_how_long(age_s: float, expected: str) -> None:
    console = Console(width=80, color_system=None)
    step = RunningStep("converting [a model]", " (part 1)", time.monotonic() - age_s)
    with console.capture() as shown:
        console.print(step)
    assert shown.get() == f"converting [a model] (part 1){expected}\n"
