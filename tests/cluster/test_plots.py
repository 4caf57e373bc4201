"""Plots: what could not be drawn is refused before the work, and no failure loses results."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from matplotlib.figure import Figure

from kvmesh.client import FakeServer
from kvmesh.cluster.cli import eval_commands
from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.cluster.cli.plots import plotter
from kvmesh.workers.evaluation import perplexity, ruler
from kvmesh.workers.evaluation.reports import (
    FormatPerplexity,
    FormatRuler,
    PerplexityReport,
    RulerReport,
)
from tests.cluster.test_bench_commands import server as server
from tests.cluster.test_cli import run
from tests.repo.imports import ROOT

EXACT = FormatPerplexity("exact", 20.0, 0.0, 0.0, None, 4.0, 4.0, 4.0, 1000.0, 0, 0)
SCORE = FormatRuler("exact", 4096, "variables", 1.0, None)


def refusal(path: Path) -> str:
    with pytest.raises(typer.BadParameter) as caught:
        plotter(path, "--plot", "plan_plot", "plot_plans")
    assert caught.value.param_hint == "--plot"
    return caught.value.message


def test_a_file_that_could_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in {
        "none/a.png": "none is not a directory",
        ".": "is a directory",
        "a.jpgg": "must end in one of",
        "plot": "must end in one of",
    }.items():
        assert words in refusal(tmp_path / name)
    plotter(tmp_path / "a.PNG", "--plot", "plan_plot", "plot_plans")
    existing = tmp_path / "b.png"
    existing.touch()
    for locked in (tmp_path, existing):
        monkeypatch.setattr(os, "access", lambda path, _, locked=locked: path != locked)
        assert "cannot be written to" in refusal(existing if locked == existing else tmp_path / "c")


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'kvmesh[plot]'" in refusal(tmp_path / "a.png")


def fail_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def savefig(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `kvmesh eval` measures, without a model."""
    losses = PerplexityReport("m", "r", "float32", "exact", 64, 2048, 1, 2047, [EXACT])
    scores = RulerReport("m", "r", "float32", "exact", 64, None, 1, 0, [SCORE])
    monkeypatch.setattr(perplexity, "measure_perplexity", lambda *_, **__: losses)
    monkeypatch.setattr(ruler, "measure_ruler", lambda *_, **__: scores)
    monkeypatch.setattr(eval_commands, "evaluated", lambda *_: contextlib.nullcontext((None, None)))


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "--model", "llama-3-8b", "--plot"),
        ("bench", "serve", "--requests", "3", "--output", "2", "--png"),
        ("eval", "perplexity", "--kv-format", "int8", "--text", str(ROOT / "LICENSE"), "--plot"),
        ("eval", "ruler", "--kv-format", "int8", "--plot"),
    ],
)
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_results_are_printed_before_they_are_plotted(
    command: tuple[str, ...],
    as_json: tuple[str, ...],
    server: FakeServer,
    reports: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_to_save(monkeypatch)
    result = run(*command, str(tmp_path / "a.png"), *as_json)
    assert result.exit_code == ExitCode.FAILED, result.output
    assert result.stdout.strip()
    assert f"cannot plot to {tmp_path / 'a.png'}: [Errno 28]" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
