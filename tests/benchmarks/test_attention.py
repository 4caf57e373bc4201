"""The decode attention benchmark runs completely at a tiny shape: gates, baselines, table.

Without a GPU it runs in Triton's interpreter. FlashInfer is replaced by its documented page
table in plain torch, which checks how the benchmark calls it.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import attention, baselines
from benchmarks.baselines import Shape, measure_baselines
from kvmesh.kernels.attention import paged_attention

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class StandIn:
    """BatchDecodeWithPagedKVCacheWrapper as documented, with layout HND.

    Sequence i's pages are indices[indptr[i] : indptr[i + 1]], the last of which holds
    last_page_len[i] tokens; pages are [num_pages, 2, num_kv_heads, page_size, head_dim].
    """

    made: ClassVar[list[bool]]
    off_by = 0.0

    def __init__(self, workspace: torch.Tensor, layout: str, *, use_tensor_cores: bool) -> None:
        assert workspace.dtype == torch.uint8 and layout == "HND"
        type(self).made.append(use_tensor_cores)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
        self.table = indptr.tolist(), indices.long().cpu(), last_page_len.tolist()
        self.sizes = num_qo_heads, num_kv_heads, head_dim, page_size
        self.dtypes = q_data_type, kv_data_type

    def run(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, dim, size = self.sizes
        assert kv.shape[1:] == (2, kv_heads, size, dim) and q.shape[1:] == (heads, dim)
        assert (q.dtype, kv.dtype) == self.dtypes
        indptr, indices, lasts = self.table
        outs = []
        for seq, (start, stop) in enumerate(pairwise(indptr)):
            pages = kv.cpu().float()[indices[start:stop]]
            tokens = (stop - start - 1) * size + lasts[seq]
            k, v = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :tokens]
            one = torch.nn.functional.scaled_dot_product_attention(
                q[seq].cpu().float()[:, None], k, v, enable_gqa=True
            )
            outs.append(one[:, 0])
        return (torch.stack(outs) + self.off_by).to(q)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    class Fresh(StandIn):
        made: ClassVar[list[bool]] = []

    module: Any = ModuleType("flashinfer")
    module.__spec__ = "present"
    module.BatchDecodeWithPagedKVCacheWrapper = Fresh
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return Fresh


@pytest.mark.slow
def test_a_dry_run_checks_measures_and_writes(
    flashinfer: type[StandIn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "attention.json"
    attention.main(["--dry-run", "--format", "exact", "k4v2", "--output", str(output)])
    report = json.loads(output.read_text())
    assert [row["kv_format"] for row in report["rows"]] == ["exact", "k4v2"]
    assert [row["path"] for row in report["rows"]] == ["plain", "integer"]
    for row in report["rows"]:
        assert 0 < row["error"] <= row["error_allowed"]
        assert math.isclose(
            row["gb_per_s"], row["bytes"] / row["time_us"] / 1e3, rel_tol=1e-2, abs_tol=0.1
        )
        best = min(row["sdpa_us"], row["flashinfer_us"])
        assert row["speed_up"] == pytest.approx(best / row["time_us"], abs=0.02)
        assert row["flashinfer_fp8_us"] > 0
    assert {"device", "clocks", "copy_gb_per_s", "torch", "triton"} <= set(report["conditions"])
    assert set(report["baselines"][0]["fastest"]) == {"sdpa", "flashinfer", "flashinfer_fp8"}
    assert flashinfer.made == [False, True] * 2  # bf16, then fp8
    printed = capsys.readouterr().out
    assert "b2 200 2x3 d64" in printed and "FlashInfer" in printed


@pytest.mark.slow
def test_wrong_output_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        out, lse = paged_attention(*arguments, **options)
        return out + 0.1, lse

    monkeypatch.setattr(attention, "paged_attention", wrong)
    with pytest.raises(SystemExit, match=r"exact.*error 1\.0\de-01, allowed"):
        attention.main(["--dry-run", "--format", "exact"])


@pytest.mark.slow
def test_a_wrong_baseline_gets_no_figure(
    flashinfer: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    flashinfer.off_by = 1.0
    found = measure_baselines(attention.TINY)
    assert found.flashinfer_s is None and found.flashinfer_fp8_s is None
    assert found.bf16_s == found.sdpa_s is not None
    assert "off by" in capsys.readouterr().err


@pytest.mark.slow
def test_without_flashinfer_sdpa_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    found = measure_baselines(Shape(1, 70, 1, 2, 64))
    assert found.flashinfer_s is None and found.sdpa_s is not None


def test_shapes_that_do_not_fit_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (attention, baselines):
        monkeypatch.setattr(module, "free_bytes", lambda: 1000)
    attention.main(["--dry-run", "--format", "int8"])
    reported = capsys.readouterr().err
    assert reported.count("do not fit 1,000") == 4  # sdpa, flashinfer twice, and ours


def test_the_grid() -> None:
    grid = list(
        attention.shapes(
            attention.HEADS, attention.HEAD_DIMS, attention.BATCHES, attention.CONTEXTS
        )
    )
    assert len(grid) == len(set(grid)) == 3 * 2 * 10
    assert {(s.batch, s.context) for s in grid if s.context > 131072} == {(1, 1048576)}
    assert {(s.kv_heads, s.group) for s in grid} == {(8, 4), (8, 8), (32, 1)}
