"""Time per output token at long contexts: its plans match a scheduler's, and it runs completely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode
from benchmarks.decode_steps import DecodeSteps
from benchmarks.device import DEVICE
from benchmarks.random_model import RandomModelExecutor, dtype_on
from kvmesh.kernels.attention import paged_attention
from kvmesh.workers.sizes import PageGeometry


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (1, 2), (2, 0), (0, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_page_that_a_step_reads_exists(sink: int, recent: int, batch: int) -> None:
    """The rule of workers/sizes.py, on tables maintained like those of a rank."""
    size, context, steps = 16, 200, 60
    geometry = PageGeometry(size, sink, recent, 100, 10)
    made = DecodeSteps(geometry, batch=batch, context=context, steps=steps)
    hot: dict[tuple[int, int], int] = {}
    sealed: dict[tuple[int, int], int] = {}
    written: dict[int, tuple[int, int]] = {}  # hot id -> whose page it is
    seals = 0
    for number in range(steps):
        plan = made.plan([7] * batch)
        assert plan.step == number + 1
        assert len(plan.row_starts) == (batch if number == 0 else 0)
        for table, update in ((hot, plan.hot), (sealed, plan.sealed)):
            for row, page, page_id in zip(update.rows, update.pages, update.ids, strict=True):
                table[row, page] = page_id
        for row, page, page_id in zip(plan.hot.rows, plan.hot.pages, plan.hot.ids, strict=True):
            written[page_id] = (row, page)
        for chunk in plan.chunks:
            page = chunk.start // size
            assert chunk.sample and chunk.num_tokens == 1
            for p in range(page + 1):
                if p < sink or p >= page - recent:
                    assert written[hot[chunk.row, p]] == (chunk.row, p)
                else:
                    assert 0 <= sealed[chunk.row, p] < made.allocation.sealed_pages
        for hot_id, sealed_id, p in zip(
            plan.seal_hot, plan.seal_sealed, plan.seal_pages, strict=True
        ):
            row, page = written[hot_id]
            assert (page, sealed[row, page]) == (p, sealed_id)
            seals += 1
    assert len(set(sealed.values())) == len(sealed)
    assert max(written) < made.allocation.hot_pages
    assert max(chunk.end for chunk in plan.chunks) == context
    assert seals >= batch * (steps // size)
    assert DecodeSteps.pool_bytes(geometry, batch=batch, context=context) == (
        100 * made.allocation.hot_pages + 10 * made.allocation.sealed_pages
    )


@pytest.mark.slow
def test_a_tiny_model_runs_and_is_reported(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    report = decode.main(
        [
            *("--shape", "tiny", "--context", "1024", "--batch", "1", "3", "--steps", "64"),
            *("--format", "exact", "k4v2", "--graphs", "off", "--output", str(output)),
        ]
    )
    assert json.loads(output.read_text())["rows"] == report["rows"]
    found = [(row["kv_format"], row["batch"]) for row in report["rows"]]
    assert found == [("exact", 1), ("k4v2", 1), ("exact", 3), ("k4v2", 3)]
    assert report["conditions"]["copy_gb_per_s"] > 0
    for row in report["rows"]:
        assert row["sealed_pages"] == row["batch"]  # each fills one page in 64 steps
        assert row["ms"] > 0 and row["host_ms"] < row["ms"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
    exact, low = report["rows"][2:]
    assert exact["x_exact"] is None
    assert low["x_exact"] == pytest.approx(exact["ms"] / low["ms"])
    # 15 or 16 pages of each of 3 sequences, 64 tokens x 2 layers x 2 heads x 2 x 64 numbers each.
    page_bytes = 64 * 2 * 2 * 2 * 64 * dtype_on(DEVICE).itemsize
    assert 45 * page_bytes <= exact["kv_bytes"] <= 48 * page_bytes
    assert low["kv_bytes"] < 0.5 * exact["kv_bytes"]  # 4 pages exact, the others in 3 bits


class AheadExecutor(RandomModelExecutor):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.max_in_flight = 2


@pytest.mark.slow
def test_contexts_that_do_not_fit_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The format that fits runs as on a GPU, with a step submitted before the last is read."""
    monkeypatch.setattr(decode, "RandomModelExecutor", AheadExecutor)
    free = iter([decode.MARGIN_BYTES, None])  # the exact pool does not fit, the next does
    monkeypatch.setattr(decode, "free_bytes", lambda: next(free))
    report = decode.main(
        [
            *("--shape", "tiny", "--context", "256", "--batch", "1", "--steps", "4"),
            *("--format", "exact", "int8", "--graphs", "off"),
        ]
    )
    assert [(row["kv_format"], row["x_exact"]) for row in report["rows"]] == [("int8", None)]
    assert "skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_kernel_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, backend: str, **options: Any) -> Any:
        out, lse = paged_attention(*arguments, backend=backend, **options)
        return (out.flip(1) if backend == "triton" else out), lse

    monkeypatch.setattr("benchmarks.gate.paged_attention", wrong)
    with pytest.raises(SystemExit, match="int8: the kernels' output is off"):
        decode.main(["--shape", "tiny", "--context", "256", "--batch", "1", "--format", "int8"])
