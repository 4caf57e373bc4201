"""Requests per second at a ShareGPT-like mix: the mix matches, and the engine serves it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import throughput
from benchmarks.random_model import SHAPES
from benchmarks.throughput import Request, held_tokens, mix


def test_the_mix_has_the_published_means() -> None:
    requests = mix(20_000, seed=1)
    assert requests == mix(20_000, seed=1) != mix(20_000, seed=2)
    # The longest are truncated, which lowers the means slightly.
    assert 0.93 * 161.31 < statistics.mean(r.prompt for r in requests) < 161.31 * 1.01
    assert 0.93 * 337.99 < statistics.mean(r.output for r in requests) < 337.99 * 1.01
    assert all(4 <= r.prompt <= 1024 and r.output >= 1 for r in requests)
    assert max(r.prompt + r.output for r in requests) <= 2048


def test_a_scaled_mix_has_the_same_number_of_pages() -> None:
    for whole, scaled in zip(mix(50, seed=0), mix(50, seed=0, scale=4), strict=True):
        assert -(-whole.prompt // 64) == -(-scaled.prompt // 16)
        assert -(-whole.output // 64) == -(-scaled.output // 16)


@pytest.mark.slow
def test_kernels_are_checked_in_the_shape_that_is_served() -> None:
    throughput.check_kernels(["exact", "k4v2"], SHAPES["tiny"], 64)


def test_long_outputs_hold_their_pages_for_longer() -> None:
    assert held_tokens([Request(100, 2)]) == 101
    assert held_tokens([Request(100, 100), Request(100, 300)]) == 225


@pytest.mark.slow
def test_every_format_serves_the_same_requests(tmp_path: Path) -> None:
    output = tmp_path / "throughput.json"
    report = throughput.main(
        [
            *("--model", "tiny", "--requests", "16", "--kv-memory-mb", "6", "--rounds", "2"),
            *("--scale", "4"),
            *("--format", "exact", "int8", "--json", str(output)),
        ]
    )
    assert json.loads(output.read_text()) == report
    assert report["rounds"] == 2
    rows = {row["kv_format"]: row for row in report["rows"]}
    assert list(rows) == ["exact", "int8"]
    assert rows["exact"]["gain"] == 1.0
    for row in rows.values():
        assert row["gain_range"][0] <= row["gain"] <= row["gain_range"][1]
        assert row["requests_per_s"] == pytest.approx(16 / row["seconds"])
        assert row["saturated_tokens_per_s"] is None or row["saturated_tokens_per_s"] > 0
        assert row["max_running"] <= row["seats"] <= row["seats_wanted"]
    # The same memory holds more sequences.
    assert rows["int8"]["seats_wanted"] > 1.2 * rows["exact"]["seats_wanted"]
    assert rows["int8"]["steps"] <= rows["exact"]["steps"]
