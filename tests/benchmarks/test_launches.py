"""Launches, compilations and host work of steps on a GPU have not grown, and none compiles late.

In a separate process: here Triton may be in interpreter mode.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "launches.json"


@pytest.mark.slow
def test_no_count_has_grown_and_nothing_compiles_after_warm_up() -> None:
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.launches", "--rounds", "0", "--workload", "60"]
    done = subprocess.run(
        [*command, "--check", str(TABLE)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def rows() -> dict[tuple[str, int], dict[str, float]]:
    return {(row["case"], row["tp"]): row for row in json.loads(TABLE.read_text())["rows"]}


def test_the_recorded_counts_reach_their_targets() -> None:
    table = rows()
    for (case, _), row in table.items():
        assert row["compiled"] == 0
        assert row["waits_a_step"] == 0
        assert row["looked_up_a_layer"] == 0
        if case.startswith("decode"):
            assert row["kernels_a_layer"] + row["torch_a_layer"] <= 10 + ("shared" in case)
            # 72 calls take 17 µs, of 141 that took 34.
            assert row["calls_of_attention"] <= 72 + 13 * ("shared" in case)


def test_the_host_does_not_work_more_for_longer_contexts() -> None:
    short, long = rows()["decode 1 x 4k", 1], rows()["decode 1 x 1M", 1]
    assert long["calls_a_step"] == short["calls_a_step"]
    assert long["host_bytes"] <= short["host_bytes"] + 1024


def test_a_long_sequence_fills_the_gpu_whatever_is_next_to_it() -> None:
    for case in ("decode 1 x 1M", "decode 1M + 15 short", "decode 1M + 255 short"):
        assert rows()[case, 8]["fill"] >= 9  # programs of one warp for each multiprocessor
    assert rows()["prefill 512 at 1M", 8]["fill"] >= 2
