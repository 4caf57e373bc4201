"""The benchmark of masks runs, at a size that takes no time."""

from __future__ import annotations

from benchmarks.structured import GRAMMARS, measure


def test_masks_are_measured() -> None:
    result = measure(600, batches=(1, 3), steps=4)
    assert [(row["kind"], row["batch"]) for row in result["rows"]] == [
        (kind, batch) for kind in GRAMMARS for batch in (1, 3)
    ]
    assert all(row["median_ms"] > 0 for row in result["rows"])
