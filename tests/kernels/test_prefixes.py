"""Prefixes that several sequences share and read together: the same result as separately."""

from __future__ import annotations

from typing import Unpack

import pytest
import torch

from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_launch import sharers
from kvmesh.kernels.formats.registry import get_format
from tests.kernels.cases import AttentionOptions, Case, Shape, make_case, truth, with_prefixes

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sequences 0, 2, 5 read the first set together, and 1, 4 the second; 3 has a chunk.
SEQUENCES = [(260, 1), (330, 1), (300, 1), (270, 20), (500, 1), (257, 1), (64, 1)]


def check(case: Case, backend: str, **options: Unpack[AttentionOptions]) -> None:
    scale = case.shape.head_dim**-0.5
    there = case.to(DEVICE) if backend == "triton" else case
    out, lse = paged_attention(
        there.q,
        there.hot,
        there.sealed,
        there.batch,
        fmt=case.fmt,
        scale=scale,
        params=case.params,
        backend=backend,
        **options,
    )
    want_out, want_lse = truth(case, scale=scale, **options)
    same_dtype = truth(case, scale=scale, **options, dtype=case.q.dtype)[0]
    limit = 2 * (same_dtype.double() - want_out).abs().max() + 2e-4
    assert (out.cpu().double() - want_out).abs().max() <= limit
    assert (lse.cpu().double() - want_lse).abs().max() < 2e-3


@pytest.mark.parametrize("backend", ["numba", "triton", "reference"])
@pytest.mark.parametrize("name", ["exact", "int8", "k4v4", "fp8"])
def test_sets_of_sequences(name: str, backend: str) -> None:
    shape = Shape(page_size=64, sink_pages=1, recent_pages=0)
    case = make_case(get_format(name), shape, SEQUENCES, shared_prefix_pages=4)
    check(with_prefixes(case, [([0, 2, 5], 3), ([1, 4], 2)], padding=1), backend)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", ["nuq4", "int8-static"])
def test_sets_of_sequences_in_formats_for_comparison(name: str, backend: str) -> None:
    shape = Shape(page_size=64, sink_pages=1)
    case = make_case(get_format(name), shape, SEQUENCES, shared_prefix_pages=4)
    check(with_prefixes(case, [([0, 2, 5], 3), ([1, 4], 2)]), backend)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_one_set_with_the_maximum_number_of_members(backend: str) -> None:
    shape = Shape(num_heads=16, num_kv_heads=1, page_size=64)
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else None
    geometry = Geometry(1, 16, shape.head_dim, shape.page_size, torch.float32.itemsize)
    _, count = sharers(get_format("k4v4"), geometry, capability)
    case = make_case(
        get_format("k4v4"), shape, [(200 + i, 1) for i in range(count)], shared_prefix_pages=3
    )
    check(with_prefixes(case, [(list(range(count)), 3)]), backend)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_softcap_and_windows_that_begin_after_a_prefix(backend: str) -> None:
    shape = Shape(page_size=64, sink_pages=1)
    case = make_case(get_format("int8"), shape, SEQUENCES, shared_prefix_pages=4)
    case = with_prefixes(case, [([0, 2, 5], 3), ([1, 4], 2)])
    check(case, backend, softcap=20.0)
    check(case, backend, sliding_window=100)


def test_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmesh.kernels.attention import numba_attention

    monkeypatch.setattr(numba_attention, "MIN_PAGES_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        decoding = [seq for seq in SEQUENCES if seq[1] == 1]
        case = make_case(
            get_format("int8"), Shape(page_size=64, num_heads=2), decoding, shared_prefix_pages=3
        )
        check(with_prefixes(case, [([0, 1, 2, 3, 4], 3)]), "numba")
        check(with_prefixes(case, []), "numba")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_pages_of_a_prefix_are_read_through_one_sequence_only(backend: str) -> None:
    """The other sequences' entries are not read: invalid page ids in them do no harm."""
    case = make_case(
        get_format("int8"), Shape(page_size=64), [(260, 1), (300, 1)], shared_prefix_pages=4
    )
    want = truth(case, scale=0.125)[0]
    case.batch.sealed_tables[case.batch.rows[1].long(), :4] = int(case.sealed.shape[0]) - 1
    there = with_prefixes(case, [([0, 1], 4)])
    if backend == "triton":
        there = there.to(DEVICE)
    out, _ = paged_attention(
        there.q, there.hot, there.sealed, there.batch, fmt=case.fmt, scale=0.125, backend=backend
    )
    assert (out.cpu().double() - want).abs().max() < 1e-2
