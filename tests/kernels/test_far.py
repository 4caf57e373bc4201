"""Far keys: decoded once for a large chunk, and attended to by another operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvmesh.kernels import workspace
from kvmesh.kernels.attention import dense, far, paged_attention, triton_launch
from kvmesh.kernels.attention.dense import DenseAttention, dense_attention
from kvmesh.kernels.attention.far import FarWork, workspace_numbers
from kvmesh.kernels.attention.triton_far import FarLaunches
from kvmesh.kernels.attention.window import Windows
from kvmesh.kernels.attention.work import Lengths
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.merge import merge_states
from kvmesh.kernels.workspace import AttentionShape
from tests.kernels.cases import Case, Shape, make_case, truth
from tests.kernels.test_dealt_pages import of_rank

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOWS = Windows(page_size=64, sink_pages=1, recent_pages=2, sliding_window=None)
H100 = {"num_heads": 32, "group": 4, "processors": 132}


def work_of(
    *sequences: tuple[int, int], windows: Windows = WINDOWS, **changes: int
) -> tuple[Lengths, FarWork]:
    """sequences: (total tokens, new tokens)"""
    starts = np.cumsum([0, *(new for _, new in sequences)])
    lengths = Lengths(starts, np.array([total for total, _ in sequences]))
    shape = {**H100, **changes}
    return lengths, FarWork.of(lengths, windows, **shape)


# Which keys are far


def test_the_pages_that_all_queries_see_are_far_in_whole_chunks() -> None:
    _, found = work_of((100, 1), (64 * 300 + 8192, 8192), (9000, 40))
    assert found.chunks.tolist() == [0, (300 - 2) // 64, 0]
    (keys,) = found.keys
    assert (keys.seq, keys.first, keys.end) == (1, 1, 256)  # after the sink
    assert keys.tokens == slice(1, 8193)


def test_a_chunk_has_far_keys_only_if_that_pays() -> None:
    def has_any(new: int, past: int = 2**17, windows: Windows = WINDOWS, **changes: int) -> bool:
        return bool(work_of((past + new, new), windows=windows, **changes)[1].keys)

    assert has_any(8192)
    assert has_any(workspace.MIN_FAR_ROWS // 4, processors=100)
    assert not has_any(workspace.MIN_FAR_ROWS // 4 - 1, processors=100)
    assert not has_any(512)  # its 16,384 rows do not fill 132 processors
    assert not has_any(4096, num_heads=4)
    assert has_any(8192, num_heads=4)
    assert not has_any(8192, past=4096 + 127)  # less than a chunk before the recent window
    assert has_any(8192, past=4096 + 128)
    assert not has_any(8192, windows=replace(WINDOWS, sliding_window=2**16))


def test_pieces_are_cut_at_fixed_positions() -> None:
    _, found = work_of((2**18, 8192))
    (keys,) = found.keys
    pieces = list(keys.pieces(64))
    assert pieces == [(1, 1024), (1024, 2048), (2048, 3072), (3072, keys.end)]
    held = workspace_numbers(found.keys, 64, 8, 128) * 2
    shape = AttentionShape(32, 8, 128, 2, max_seq_len=2**18, max_queries=8192)
    fmt = get_format("int8")
    limit = shape.workspace_bytes(fmt, far=True) - shape.workspace_bytes(fmt, far=False)
    # The workspace, and for each row: the sum so far, a piece's output, its share, two lses.
    rows = 8192 * 32 * (128 * (4 + 2 + 2) + 4 * 4)
    assert held == 2**28
    assert limit == held + rows


# The operator for plain keys


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 80), (8, 128)])
def test_an_operator_is_found_and_is_right(group: int, head_dim: int) -> None:
    found = dense_attention(DEVICE, torch.bfloat16, group, head_dim)
    assert found is not None and found.name


@pytest.mark.parametrize("fault", ["output", "base of the lse", "not built"])
def test_an_operator_that_is_wrong_or_fails_is_passed_over(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = dense_attention(DEVICE, torch.bfloat16, 2, 32)
    assert right is not None

    def attend(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        if fault == "not built":
            raise RuntimeError("no kernel image is available")
        out, lse = right.attend(*arguments)  # type: ignore[arg-type]
        return (out * 1.1, lse) if fault == "output" else (out, lse / np.log(2.0))

    monkeypatch.setattr(
        dense, "_installed", lambda _: iter([DenseAttention("faulty", attend), right])
    )
    dense_attention.cache_clear()
    try:
        assert dense_attention(DEVICE, torch.bfloat16, 2, 32) is right
        assert "faulty" in caplog.text
        monkeypatch.setattr(dense, "_installed", lambda _: iter([DenseAttention("faulty", attend)]))
        dense_attention.cache_clear()
        assert dense_attention(DEVICE, torch.bfloat16, 2, 32) is None
    finally:
        dense_attention.cache_clear()


# Both together


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Chunks of 64 tokens, pieces of 192, and any chunk of queries is large; the number of far
    keys of each layer that was computed."""
    monkeypatch.setattr(workspace, "PREFILL_CHUNK_TOKENS", 64)
    monkeypatch.setattr(workspace, "FAR_TOKENS", 192)
    monkeypatch.setattr(workspace, "MIN_FAR_ROWS", 8)
    monkeypatch.setattr(far, "PROGRAM_ROWS", 1)
    counts: list[int] = []
    run = FarLaunches.run

    def counted(self: FarLaunches, *tensors: torch.Tensor) -> None:
        counts.append(len(self.chunks))
        run(self, *tensors)

    monkeypatch.setattr(FarLaunches, "run", counted)
    triton_launch.prefill_launch.cache_clear()
    yield counts
    triton_launch.prefill_launch.cache_clear()


def attend(case: Case, **options: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    there = case.to(str(DEVICE))
    out, lse = paged_attention(
        there.q,
        there.hot,
        there.sealed,
        there.batch,
        fmt=case.fmt,
        scale=case.shape.head_dim**-0.5,
        params=there.params,
        backend="triton",
        **options,  # type: ignore[arg-type]
    )
    return out.cpu(), lse.cpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("int8", Shape(6, 2, 80, 32, 1, 1)),
        ("exact", Shape(2, 2, 64, 16, 0, 0)),
        ("k3v2", Shape(3, 1, 64, 32, 2, 2)),
        ("fp8", Shape(4, 1, 64, 16, 5, 0)),  # a sink longer than a chunk
        ("kivi4", Shape(2, 1, 64, 32, 1, 1)),  # decoded to exact pages first
    ],
)
def test_far_and_near_keys_make_the_whole(name: str, shape: Shape, small: list[int]) -> None:
    """Among sequences that decode, that have too few queries, and that have no past."""
    sequences = [(70, 1), (280, 9), (200, 3), (24, 24), (265, 12), (1, 1)]
    case = make_case(get_format(name), shape, sequences, padding_tokens=2)
    out, lse = attend(case)
    assert small == [2 + (shape.num_heads >= 3 * shape.num_kv_heads)]
    want, want_lse = truth(case, scale=shape.head_dim**-0.5)
    count = len(want)
    # Rows that decode may take the integer path; those of chunks do not.
    chunks = torch.ones(count, dtype=torch.bool)
    chunks[case.batch.query_starts[:-1][[0, 5]].long()] = False
    assert (out[:count].double() - want)[chunks].abs().max() < 5e-6
    assert (lse[:count].double() - want_lse)[chunks].abs().max() < 1e-5
    assert (out[:count].double() - want).abs().max() < 1e-3
    assert (out[count:] == 0).all() and lse[count:].isneginf().all()


@pytest.mark.slow
def test_a_layer_with_a_softcap_has_no_far_keys(small: list[int]) -> None:
    case = make_case(get_format("exact"), Shape(1, 1, 32, 32, 1, 1), [(150, 9)])
    out, _ = attend(case, softcap=15.0)
    assert not small
    want, _ = truth(case, scale=32**-0.5, softcap=15.0)
    assert (out.double() - want).abs().max() < 5e-6
    attend(replace(case, batch=replace(case.batch)))
    assert small == [1]


@pytest.mark.slow
def test_pages_that_are_dealt_to_ranks(small: list[int]) -> None:
    kvp = 3
    shape = Shape(3, 1, 64, 16, 1, 1)
    case = make_case(get_format("int8"), shape, [(33, 1), (400, 10), (300, 12)])
    parts = [attend(of_rank(case, kvp, rank)) for rank in range(kvp)]
    assert small == [2] * kvp
    out, lse = merge_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
    want, want_lse = truth(case, scale=64**-0.5)
    assert (out.double() - want).abs().max() < 5e-6
    assert (lse.double() - want_lse).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("window", [150, -200])
def test_windows_in_several_slabs(
    window: int, small: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window's first chunk is far from the sequence's first, and blocks of queries are computed
    a few at a time."""
    monkeypatch.setattr(workspace, "MAX_PREFILL_BYTES", 1)
    case = make_case(get_format("exact"), Shape(32, 1, 32, 32, 1, 1), [(450, 5)])
    out, _ = attend(case, sliding_window=window)
    assert not small
    want, _ = truth(case, scale=32**-0.5, sliding_window=window)
    assert (out.double() - want).abs().max() < 5e-6
