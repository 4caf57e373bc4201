"""`paged_attention` in plain torch against expected results in fp64."""

from __future__ import annotations

import itertools
from typing import Any, Unpack

import pytest
import torch

from kvmesh.kernels.attention import chunk_blocks, paged_attention, reference
from kvmesh.kernels.formats.registry import format_names, get_format
from tests.kernels.cases import (
    AttentionOptions,
    Case,
    Shape,
    make_case,
    truth,
    with_empty_sequences,
)

# All to serve, and one of each encoding that is for comparison.
NAMES = [*format_names(comparison=False), "kivi4", "nuq3", "int8-static", "turboquant-sign"]
# One is quick enough for `make test-fast`.
IN_DEPTH: list[Any] = [
    name if name == "int8" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES
]
MIXED = [(1, 1), (15, 1), (16, 1), (17, 1), (63, 1), (64, 64), (65, 9), (200, 33), (130, 1)]


def check(case: Case, **options: Unpack[AttentionOptions]) -> None:
    scale = case.shape.head_dim**-0.5
    out, lse = paged_attention(
        case.q,
        case.hot,
        case.sealed,
        case.batch,
        fmt=case.fmt,
        scale=scale,
        params=case.params,
        backend="reference",
        **options,
    )
    want_out, want_lse = truth(case, scale=scale, **options)
    same_dtype = truth(case, scale=scale, **options, dtype=case.q.dtype)[0]
    limit = 2 * (same_dtype.double() - want_out).abs().max() + 2e-6
    count = want_out.shape[0]
    assert (out[:count].double() - want_out).abs().max() <= limit
    assert (lse[:count].double() - want_lse).abs().max() < 1e-5
    assert (out[count:] == 0).all()
    assert (lse[count:] == -torch.inf).all()


@pytest.mark.parametrize("name", IN_DEPTH)
@pytest.mark.parametrize("windows", [(0, 0), (1, 0), (0, 2), (2, 1)])
def test_mixed_batch_matches_the_expected_results(name: str, windows: tuple[int, int]) -> None:
    shape = Shape(sink_pages=windows[0], recent_pages=windows[1])
    check(make_case(get_format(name), shape, MIXED))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [(1, 1, 64, 16), (9, 3, 80, 32), (8, 2, 128, 64), (8, 1, 64, 128)],
)
def test_shapes(name: str, heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
    shape = Shape(heads, kv_heads, head_dim, page_size, recent_pages=1)
    check(make_case(get_format(name), shape, [(1000, 1), (300, 40), (63, 63), (65, 1)]))


WINDOWS = (1, 16, 40, 1000, -24, -64)
SOFTCAPS = (None, 20.0)


@pytest.mark.parametrize("name", IN_DEPTH)
@pytest.mark.parametrize("window", WINDOWS)
def test_softcap_and_sliding_window(name: str, window: int) -> None:
    """Every pair of a format, a window and a softcap, but not every three of them."""
    softcap = SOFTCAPS[(NAMES.index(name) + WINDOWS.index(window)) % 2]
    case = make_case(get_format(name), Shape(sink_pages=1, recent_pages=1), MIXED)
    check(case, softcap=softcap, sliding_window=window)


@pytest.mark.parametrize("window", [None, 40])
def test_scores_of_a_softcap_are_computed_in_pieces(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """A chunk of a long prompt has more than are kept at once; each piece has its own mask."""
    monkeypatch.setattr(reference, "MAX_SCORES", 2000)
    case = make_case(get_format("int8"), Shape(sink_pages=1, recent_pages=1), [(300, 90), (70, 70)])
    check(case, softcap=20.0, sliding_window=window)


@pytest.mark.parametrize("name", NAMES)
def test_decode_alone_with_padding_rows(name: str) -> None:
    lengths = (300, 17, 31, 16, 1, 250, 100, 299)
    case = make_case(get_format(name), Shape(), [(n, 1) for n in lengths], padding_tokens=3)
    check(case)


def test_sequences_without_a_query_are_padding() -> None:
    case = make_case(get_format("int8"), Shape(), [(40, 1), (17, 3)], padding_tokens=2)
    check(with_empty_sequences(case, 2))


@pytest.mark.parametrize("name", NAMES)
def test_shared_pages(name: str) -> None:
    case = make_case(
        get_format(name), Shape(), [(100, 1), (90, 20), (100, 1)], shared_prefix_pages=3
    )
    assert (case.batch.sealed_tables[case.batch.rows.long(), 0].unique().numel()) == 1
    check(case)


@pytest.mark.slow
def test_bf16_pages() -> None:
    for name in NAMES:
        check(make_case(get_format(name), Shape(recent_pages=1), MIXED, dtype=torch.bfloat16))


@pytest.mark.slow
def test_far_pages_in_parts_and_long_chunks_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_blocks, "MAX_FAR_TOKENS", 48)
    monkeypatch.setattr(chunk_blocks, "MIN_BLOCK_TOKENS", 32)
    for name, window in itertools.product(NAMES, (None, 90)):
        shape = Shape(sink_pages=1, recent_pages=1)
        check(
            make_case(get_format(name), shape, [(300, 100), (1, 1), (280, 4)]),
            sliding_window=window,
        )


@pytest.mark.parametrize("name", NAMES)
def test_chunking_and_batching_change_only_rounding(name: str) -> None:
    """Reading a page in the wrong form would cause an error as large as the quantisation error,
    1e-2 at four bits."""
    fmt, shape = get_format(name), Shape(sink_pages=1, recent_pages=1)
    whole = make_case(fmt, shape, [(200, 200)])
    options: dict[str, Any] = {
        "fmt": fmt,
        "scale": 0.125,
        "params": whole.params,
        "backend": "reference",
    }
    want, _ = paged_attention(whole.q, whole.hot, whole.sealed, whole.batch, **options)
    for length, new in ((200, 1), (200, 7), (200, 64), (150, 1), (150, 50)):
        part = make_case(fmt, shape, [(200, 200)])
        batch = part.batch
        object.__setattr__(batch, "query_starts", torch.tensor([0, new], dtype=torch.int32))
        object.__setattr__(batch, "seq_lens", torch.tensor([length], dtype=torch.int32))
        got, _ = paged_attention(
            part.q[length - new : length],
            part.hot,
            part.sealed,
            batch,
            **options,
        )
        torch.testing.assert_close(got, want[length - new : length], atol=2e-6, rtol=0)


def test_a_missing_page_is_named() -> None:
    case = make_case(get_format("int8"), Shape(), [(100, 1)])
    case.batch.sealed_tables[case.batch.rows.long(), 2] = -1
    with pytest.raises(ValueError, match=r"sealed_tables.*logical page 2"):
        paged_attention(
            case.q,
            case.hot,
            case.sealed,
            case.batch,
            fmt=case.fmt,
            scale=0.125,
            backend="reference",
        )


def test_bad_arguments_are_named() -> None:
    case = make_case(get_format("int8"), Shape(), [(40, 1)])
    good: dict[str, Any] = {"fmt": case.fmt, "scale": 0.125}
    args = (case.hot, case.sealed, case.batch)
    with pytest.raises(ValueError, match="q, hot"):
        paged_attention(case.q.bfloat16(), *args, **good)
    with pytest.raises(ValueError, match="q:"):
        paged_attention(case.q[:, :5], *args, **good)
    with pytest.raises(ValueError, match="sealed"):
        paged_attention(case.q, *args, fmt=get_format("int4"), scale=0.125)
    with pytest.raises(ValueError, match="scale"):
        paged_attention(case.q, *args, fmt=case.fmt, scale=float("nan"))
    with pytest.raises(ValueError, match="softcap"):
        paged_attention(case.q, *args, **good, softcap=0.0)
    with pytest.raises(ValueError, match="sliding_window"):
        paged_attention(case.q, *args, **good, sliding_window=0)
    with pytest.raises(ValueError, match="backend"):
        paged_attention(case.q, *args, **good, backend="cuda")
