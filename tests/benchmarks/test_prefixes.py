"""The shared-prefix benchmark runs completely at a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import prefixes
from benchmarks.baselines import Shape
from kvmesh.kernels.attention import SharedPrefixes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "TINY", (Shape(4, 120, 1, 16, 64), 64))


@pytest.mark.slow
def test_a_dry_run_compares_and_reports(tmp_path: Path) -> None:
    output = tmp_path / "prefixes.json"
    prefixes.main(["--dry-run", "--format", "k4v4", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [(row["kv_format"], row["sets"], row["members"]) for row in rows] == [("k4v4", 1, 4)]
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_a_difference_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_few(pages: torch.Tensor, members: torch.Tensor, starts: torch.Tensor) -> SharedPrefixes:
        """Sequences leave pages to a set that does not read them."""
        return SharedPrefixes(pages, members, torch.zeros_like(starts))

    monkeypatch.setattr(prefixes, "SharedPrefixes", too_few)
    with pytest.raises(SystemExit, match="they differ"):
        prefixes.main(["--dry-run", "--format", "int8"])
