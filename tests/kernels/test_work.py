"""How attention is divided: every page is read once, and nothing depends on the rest of a batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvmesh.kernels import workspace
from kvmesh.kernels.attention import paged_attention, triton_launch
from kvmesh.kernels.attention.window import Windows
from kvmesh.kernels.attention.work import DecodeWork, Lengths, PrefillWork
from kvmesh.kernels.formats.registry import get_format
from tests.kernels.cases import Case, Shape, make_case, truth, with_prefixes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOWS = Windows(page_size=64, sink_pages=1, recent_pages=2, sliding_window=None)


def lengths_of(*sequences: tuple[int, int]) -> Lengths:
    """(total tokens, new tokens)"""
    starts = np.cumsum([0, *(new for _, new in sequences)])
    return Lengths(starts, np.array([total for total, _ in sequences]))


def test_a_sequence_has_a_part_for_its_hot_pages_and_one_for_each_chunk() -> None:
    made = DecodeWork.of(
        lengths_of((1, 1), (64 * 3, 1), (64 * 4, 1), (64 * 11, 1), (5, 5)), WINDOWS
    )
    # Pages 1 to P - 3 are sealed, and chunks have 8 pages: [0, 8), [8, 16), ...
    assert np.diff(made.starts).tolist() == [1, 1, 1 + 0, 1 + 1, 0]
    assert np.diff(DecodeWork.of(lengths_of((64 * 12, 1)), WINDOWS).starts).tolist() == [1 + 2]


def test_a_long_sequence_gets_its_parts_whatever_is_next_to_it() -> None:
    long, short = (2**20, 1), (4096, 1)
    alone = DecodeWork.of(lengths_of(long), WINDOWS)
    together = DecodeWork.of(lengths_of(*[short] * 255, long), WINDOWS)
    assert alone.num_slots == 1 + 2**20 // workspace.DECODE_CHUNK_TOKENS
    assert np.diff(together.starts)[-1] == alone.num_slots


def test_a_window_has_no_parts_before_it() -> None:
    window = replace(WINDOWS, sliding_window=1024)
    made = DecodeWork.of(lengths_of((2**20, 1), (2**20 + 100, 1)), window)
    assert (np.diff(made.starts) <= 1 + 1024 // 512 + 1).all()


def test_rounds_hold_what_fits_and_at_least_one_sequence() -> None:
    lengths = lengths_of(*[(2**20, 1)] * 3, (2**23, 1), (100, 1))
    rounds = list(DecodeWork.of(lengths, WINDOWS).rounds())
    assert [(one.first_seq, one.end_seq) for one in rounds] == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
        (4, 5),
    ]
    assert rounds[0].end_slot == rounds[1].first_slot
    few = list(DecodeWork.of(lengths_of(*[(4096, 1)] * 256), WINDOWS).rounds())
    assert [(one.first_seq, one.end_seq) for one in few] == [(0, 256)]


def test_slabs_of_prefill_cover_every_item_once_and_no_more_than_fits() -> None:
    lengths = lengths_of((600, 600), (9000, 1), (2**17, 512), (2**17 + 64, 300), (30000, 2))
    item = 1 << 20
    made = PrefillWork.of(lengths, WINDOWS, 32, item)
    assert made.slabs[0].direct and made.slabs[0].end == -(-600 // 32)
    assert made.slabs[0].first == 0 and made.slabs[-1].end == made.starts[-1]
    for before, after in zip(made.slabs, made.slabs[1:], strict=False):
        assert before.end == after.first
    for slab in made.slabs[1:]:
        assert not slab.direct
        assert (slab.end - slab.first) * item <= workspace.MAX_PREFILL_BYTES


def attend(
    case: Case, backend: str = "triton", **options: int
) -> tuple[torch.Tensor, torch.Tensor]:
    there = case.to(DEVICE)
    out, lse = paged_attention(
        there.q,
        there.hot,
        there.sealed,
        there.batch,
        fmt=case.fmt,
        scale=case.shape.head_dim**-0.5,
        backend=backend,
        **options,  # type: ignore[arg-type]
    )
    return out.cpu(), lse.cpu()


def only(case: Case, seq: int) -> Case:
    """The case with one of its sequences."""
    first, end = (int(x) for x in case.batch.query_starts[seq : seq + 2])
    batch = replace(
        case.batch,
        query_starts=torch.tensor([0, end - first], dtype=torch.int32),
        seq_lens=case.batch.seq_lens[seq : seq + 1],
        rows=case.batch.rows[seq : seq + 1],
        max_query_len=end - first,
        max_seq_len=int(case.batch.seq_lens[seq]),
    )
    return replace(case, q=case.q[first:end], batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "k4v4"])
def test_attention_of_a_sequence_is_bitwise_the_same_in_any_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode and prefill in many parts, in one round and in several."""
    monkeypatch.setattr(workspace, "DECODE_CHUNK_TOKENS", 64)
    monkeypatch.setattr(workspace, "PREFILL_CHUNK_TOKENS", 128)
    made = (triton_launch.decode_launch, triton_launch.prefill_launch)
    for cached in made:
        cached.cache_clear()
    try:
        shape = Shape(2, 1, 64, 64, sink_pages=1, recent_pages=1)
        sequences = [(330, 1), (300, 40), (70, 1), (200, 3), (64, 64)]
        case = make_case(get_format(name), shape, sequences)
        out, lse = attend(case)
        want, _ = truth(case, scale=64**-0.5)
        assert (out.double() - want).abs().max() < 1e-3
        for seq, start in enumerate(case.batch.query_starts[:-1].tolist()):
            alone, alone_lse = attend(only(case, seq))
            assert torch.equal(alone, out[start : start + len(alone)])
            assert torch.equal(alone_lse, lse[start : start + len(alone)])
        monkeypatch.setattr(workspace, "MAX_SLOTS", 3)
        monkeypatch.setattr(workspace, "MAX_PREFILL_BYTES", 1)
        again, again_lse = attend(replace(case, batch=replace(case.batch)))
        assert torch.equal(again, out) and torch.equal(again_lse, lse)
    finally:
        for cached in made:
            cached.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_a_deterministic_batch_is_bitwise_the_same_token_by_token(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of a sequence, and its tokens as they would be decoded, one after the other."""
    if DEVICE == "cuda" and backend == "numba":
        pytest.skip("the compiled loops are for CPUs")
    monkeypatch.setattr(workspace, "PREFILL_CHUNK_TOKENS", 128)
    triton_launch.prefill_launch.cache_clear()
    shape = Shape(2, 1, 64, 64, sink_pages=1, recent_pages=1)
    case = make_case(get_format("k4v4"), shape, [(330, 1), (300, 12), (70, 1), (64, 7)])
    case = replace(case, batch=replace(case.batch, deterministic=True))
    one_by_one = replace(case, batch=replace(case.batch.by_query()))
    try:
        out, lse = attend(case, backend)
        again, again_lse = attend(one_by_one, backend)
    finally:
        triton_launch.prefill_launch.cache_clear()
    assert torch.equal(out, again) and torch.equal(lse, again_lse)
    want, want_lse = truth(case, scale=64**-0.5)
    assert (out.double() - want).abs().max() < 5e-6
    assert (lse.double() - want_lse).abs().max() < 1e-5


@pytest.mark.slow
def test_shared_prefixes_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(page_size=64, sink_pages=1)
    sequences = [(760, 1), (830, 1), (800, 1), (770, 20), (900, 1), (757, 1), (64, 1)]
    case = make_case(get_format("exact"), shape, sequences, shared_prefix_pages=11)
    case = with_prefixes(case, [([0, 2, 5], 10), ([1, 4], 2)], padding=1)
    out, lse = attend(case)
    want, want_lse = truth(case, scale=0.125)
    assert (out.double() - want).abs().max() < 1e-5
    assert (lse.double() - want_lse).abs().max() < 1e-5
    monkeypatch.setattr(workspace, "MAX_SLOTS", 4)
    again, _ = attend(replace(case, batch=replace(case.batch)))
    assert torch.equal(again, out)
