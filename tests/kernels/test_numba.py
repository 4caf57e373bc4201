"""Decode on CPUs in compiled loops against expected results in fp64, with the reference's rule.

Compiling a loop takes a second or two, so most formats are tested with one geometry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import pytest
import torch

from kvmesh.kernels.attention import numba_attention, paged_attention
from kvmesh.kernels.formats.registry import format_names, get_format
from tests.kernels.cases import (
    AttentionOptions,
    Case,
    Shape,
    make_case,
    truth,
    with_empty_sequences,
)

pytest.importorskip("numba")
pytestmark = pytest.mark.slow

SERVED = format_names(comparison=False)
MIXED = [(1, 1), (63, 1), (64, 1), (65, 1), (200, 33), (300, 1), (1000, 1), (128, 1), (320, 1)]


def check(case: Case, **options: Unpack[AttentionOptions]) -> None:
    scale = case.shape.head_dim**-0.5
    arguments = (case.q, case.hot, case.sealed, case.batch)
    out, lse = paged_attention(
        *arguments, fmt=case.fmt, scale=scale, params=case.params, backend="numba", **options
    )
    want_out, want_lse = truth(case, scale=scale, **options)
    same_dtype = truth(case, scale=scale, **options, dtype=case.q.dtype)[0]
    limit = 2 * (same_dtype.double() - want_out).abs().max() + 2e-6
    count = want_out.shape[0]
    assert (out[:count].double() - want_out).abs().max() <= limit
    assert (lse[:count].double() - want_lse).abs().max() < 1e-5
    assert (out[count:] == 0).all()
    assert (lse[count:] == -torch.inf).all()


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_formats_to_serve_have_a_loop() -> None:
    for name in format_names():
        fmt = get_format(name)
        served = not fmt.comparison or name == "k3v3"  # whose sides are those of others
        assert numba_attention.has_loop(fmt, 64, 64, torch.float32) == served


# Compiling a loop takes seconds.
@pytest.mark.parametrize("name", SERVED)
def test_mixed_batch_matches_the_expected_results(name: str) -> None:
    for windows in ((0, 0), (1, 0), (2, 1)):
        shape = Shape(page_size=64, sink_pages=windows[0], recent_pages=windows[1])
        check(make_case(get_format(name), shape, MIXED))


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "head_dim", "page_size"),
    [
        *((name, 9, 3, 80, 32) for name in ("int8", "k4v4", "k3v2")),
        *((name, 16, 1, 128, 128) for name in ("k4v4", "k3v2")),
        *((name, 4, 4, 256, 16) for name in ("exact", "int8", "k3v2")),
    ],
)
def test_shapes(name: str, heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
    shape = Shape(heads, kv_heads, head_dim, page_size, recent_pages=1)
    check(make_case(get_format(name), shape, [(1000, 1), (300, 40), (63, 63), (65, 1)]))


@pytest.mark.parametrize("name", ["int8", "k3v2", "fp8"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [1, 64, 100, 200, 1000, -96])
def test_softcap_and_sliding_window(name: str, softcap: float | None, window: int) -> None:
    shape = Shape(page_size=64, sink_pages=1, recent_pages=1)
    case = make_case(get_format(name), shape, MIXED)
    check(case, softcap=softcap, sliding_window=window)


@pytest.mark.parametrize("name", ["exact", "int8", "k4v2"])
def test_bf16_pages(name: str) -> None:
    shape = Shape(page_size=64, recent_pages=1)
    check(make_case(get_format(name), shape, MIXED, dtype=torch.bfloat16))


def test_rows_without_a_sequence_and_sequences_without_a_query() -> None:
    shape = Shape(page_size=64)
    case = make_case(get_format("int8"), shape, [(300, 1), (17, 1)], padding_tokens=3)
    check(case)
    check(with_empty_sequences(case, 2))


def test_threads_share_sequences_and_long_ones_are_split(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba_attention, "MIN_PAGES_PER_THREAD", 2)
    shape = Shape(page_size=64, sink_pages=1, recent_pages=1)
    check(make_case(get_format("int8"), shape, [(2000, 1)]))
    check(make_case(get_format("int8"), shape, [(1, 1), (900, 1)]))
    check(make_case(get_format("int8"), shape, [(400 + 70 * i, 1) for i in range(7)]))
    check(make_case(get_format("int8"), shape, MIXED))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [3, 130, 299])
def test_nan_and_infinity_are_propagated(bad: float, at: int) -> None:
    """To the sequence that has them, and to no other."""
    case = make_case(get_format("exact"), Shape(page_size=64), [(300, 1), (200, 1)])
    page, slot = divmod(at, 64)
    row = int(case.batch.rows[0])
    if page == 299 // 64:
        case.hot[case.batch.hot_tables[row, page], 0, :, slot, 5] = bad
    else:
        keys = case.sealed[case.batch.sealed_tables[row, page]].view(torch.float32)
        keys[:, slot * 64 + 5] = bad
    out, lse = paged_attention(
        case.q, case.hot, case.sealed, case.batch, fmt=case.fmt, scale=0.125, backend="numba"
    )
    with_sign = case.q[0, :, 5] > 0 if bad == float("inf") else torch.ones(6, dtype=torch.bool)
    assert out[0, with_sign].isnan().all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


def test_batching_does_not_change_a_bit() -> None:
    """Each sequence is computed on its own, on one thread, in a fixed order."""
    shape = Shape(page_size=64, recent_pages=1)
    together = make_case(get_format("k4v4"), shape, [(500, 1), (70, 1), (300, 1)])
    options: dict[str, Any] = {"fmt": together.fmt, "scale": 0.125, "backend": "numba"}
    arenas = (together.hot, together.sealed)
    want, _ = paged_attention(together.q, *arenas, together.batch, **options)
    for seq in range(3):
        alone = make_case(get_format("k4v4"), shape, [(500, 1), (70, 1), (300, 1)]).batch
        object.__setattr__(alone, "query_starts", torch.tensor([0, 1], dtype=torch.int32))
        object.__setattr__(alone, "seq_lens", alone.seq_lens[seq : seq + 1])
        object.__setattr__(alone, "rows", alone.rows[seq : seq + 1])
        got, _ = paged_attention(together.q[seq : seq + 1], *arenas, alone, **options)
        assert torch.equal(got[0], want[seq])


@pytest.mark.parametrize(("table", "page"), [("sealed_tables", 1), ("hot_tables", 4)])
def test_a_missing_page_is_named(table: str, page: int) -> None:
    case = make_case(get_format("int8"), Shape(page_size=64), [(300, 1)])
    getattr(case.batch, table)[case.batch.rows.long(), page] = -1
    arguments = (case.q, case.hot, case.sealed, case.batch)
    with pytest.raises(ValueError, match=rf"{table}: row \d has no page id at logical page {page}"):
        paged_attention(*arguments, fmt=case.fmt, scale=0.125, backend="numba")


def test_indices_outside_tables_and_arenas_are_refused() -> None:
    case = make_case(get_format("int8"), Shape(page_size=64), [(300, 1)])
    arguments = (case.q, case.hot, case.sealed)
    options: dict[str, Any] = {"fmt": case.fmt, "scale": 0.125, "backend": "numba"}
    row = case.batch.rows.long()
    case.batch.sealed_tables[row, 2] = len(case.sealed)
    with pytest.raises(ValueError, match=r"sealed_tables: row .* logical page 2"):
        paged_attention(*arguments, case.batch, **options)
    longer = replace(case.batch, seq_lens=case.batch.seq_lens + 64)
    with pytest.raises(ValueError, match="seq_lens: 364 tokens do not fit 5 pages"):
        paged_attention(*arguments, longer, **options)
    elsewhere = replace(case.batch, rows=case.batch.rows + 7)
    with pytest.raises(ValueError, match="rows: expected rows below 3"):
        paged_attention(*arguments, elsewhere, **options)


def test_formats_without_a_loop_are_refused_by_name_and_served_by_plain_torch() -> None:
    case = make_case(get_format("turboquant-sign"), Shape(page_size=64), [(300, 1)])
    arguments = (case.q, case.hot, case.sealed, case.batch)
    with pytest.raises(ValueError, match="turboquant-sign"):
        paged_attention(*arguments, fmt=case.fmt, scale=0.125, backend="numba")
    out, _ = paged_attention(*arguments, fmt=case.fmt, scale=0.125)
    want, _ = paged_attention(*arguments, fmt=case.fmt, scale=0.125, backend="reference")
    assert torch.equal(out, want)
