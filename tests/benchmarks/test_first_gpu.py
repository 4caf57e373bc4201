"""The script for a first GPU runs on any machine at tiny shapes, and continues where it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import first_gpu


@pytest.mark.slow
def test_a_dry_run_fills_every_section(tmp_path: Path) -> None:
    output = tmp_path / "first.json"
    report = first_gpu.main(["--dry-run", "--output", str(output)])
    assert json.loads(output.read_text()) == report
    assert list(report["sections"]) == list(first_gpu.SECTIONS)
    assert all(section["rows"] for section in report["sections"].values())
    assert "prefill" in first_gpu.table(report)


def test_sections_of_the_same_device_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "first.json"
    runs: list[str] = []

    def section(name: str) -> Callable[[bool], first_gpu.Rows]:
        def run(_tiny: bool) -> first_gpu.Rows:
            runs.append(name)
            return [{}]

        return run

    monkeypatch.setattr(first_gpu, "SECTIONS", {name: section(name) for name in ("a", "b")})
    monkeypatch.setattr(first_gpu, "conditions", lambda: {"device": "some GPU"})
    first_gpu.main(["--dry-run", "--output", str(output), "--only", "a"])
    first_gpu.main(["--dry-run", "--output", str(output), "--only", "a", "b"])
    assert runs == ["a", "b"]
    monkeypatch.setattr(first_gpu, "conditions", lambda: {"device": "another GPU"})
    first_gpu.main(["--dry-run", "--output", str(output), "--only", "a"])
    assert runs == ["a", "b", "a"]
