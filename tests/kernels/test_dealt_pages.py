"""Attention over pages that are dealt to ranks: what the ranks compute, merged, is the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.merge import merge_states
from tests.kernels.cases import Case, Shape, make_case, truth, with_prefixes

MIXED = [(1, 1), (15, 1), (16, 1), (17, 1), (63, 1), (64, 64), (65, 9), (200, 33), (130, 1)]


# Compiling the loop takes seconds.
BACKENDS = ["reference", pytest.param("numba", marks=pytest.mark.slow)]


def of_rank(case: Case, kvp: int, rank: int) -> Case:
    """What one rank has of a case whose sequences are dealt by different offsets."""
    batch = case.batch
    firsts = (rank - torch.arange(batch.num_seqs, dtype=torch.int32)) % kvp
    columns = -(-batch.hot_tables.shape[1] // kvp)
    hot, sealed = (torch.full((len(x), columns), -1) for x in (batch.hot_tables,) * 2)
    for seq, row in enumerate(batch.rows.tolist()):
        for own, table in ((hot, batch.hot_tables), (sealed, batch.sealed_tables)):
            pages = table[row, int(firsts[seq]) :: kvp]
            own[row, : len(pages)] = pages
    own_batch = replace(
        batch, hot_tables=hot.int(), sealed_tables=sealed.int(), firsts=firsts, stride=kvp
    )
    return replace(case, batch=own_batch)


def attend(case: Case, backend: str, **options: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(
        case.q,
        case.hot,
        case.sealed,
        case.batch,
        fmt=case.fmt,
        scale=case.shape.head_dim**-0.5,
        params=case.params,
        backend=backend,
        **options,  # type: ignore[arg-type]
    )


def merged(
    case: Case, kvp: int, backend: str, **options: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [attend(of_rank(case, kvp, rank), backend, **options) for rank in range(kvp)]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    assert outs.isfinite().all() and not lses.isnan().any()
    assert (outs[lses.isneginf()] == 0).all()
    return merge_states(outs, lses)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kvp", [2, 3, 8])
@pytest.mark.parametrize("windows", [(0, 0), (2, 1), (1, 3)])
@pytest.mark.parametrize("sliding_window", [None, 20, -40])
def test_parts_of_ranks_make_the_whole(
    windows: tuple[int, int], kvp: int, sliding_window: int | None, backend: str
) -> None:
    """Also where a rank has no page of a sequence, or none that some of its queries see. A window
    below 0 is one of chunks."""
    shape = Shape(sink_pages=windows[0], recent_pages=windows[1])
    case = make_case(get_format("int8"), shape, MIXED)
    options: dict[str, float | None] = {"sliding_window": sliding_window}
    out, lse = merged(case, kvp, backend, **options)
    want_out, want_lse = truth(case, scale=shape.head_dim**-0.5, **options)  # type: ignore[arg-type]
    assert (out.double() - want_out).abs().max() < 1e-5
    assert (lse.double() - want_lse).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "windows", "kvp", "sliding_window"),
    [
        ("int8", (1, 1), 3, None),
        ("exact", (0, 1), 2, 70),
        ("exact", (1, 0), 2, -70),
        ("kivi4", (0, 1), 3, None),
        ("int4", (1, 1), 2, -70),
    ],
)
def test_the_kernels_for_gpus_read_the_same_pages(
    name: str, windows: tuple[int, int], kvp: int, sliding_window: int | None
) -> None:
    shape = Shape(page_size=32, sink_pages=windows[0], recent_pages=windows[1])
    sequences = [(150, 40), (33, 1), (145, 1), (5, 1), (64, 1)]
    case = make_case(get_format(name), shape, sequences)
    options: dict[str, float | None] = {"sliding_window": sliding_window}
    out, lse = merged(case, kvp, "triton", **options)
    want_out, want_lse = truth(case, scale=shape.head_dim**-0.5, **options)  # type: ignore[arg-type]
    # The integer loop rounds weights to 16 bits. Pages of kivi4 are decoded first.
    assert (out.double() - want_out).abs().max() < 1e-3
    assert (lse.double() - want_lse).abs().max() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_prefixes_are_counted_in_columns(backend: str) -> None:
    case = make_case(
        get_format("int8"),
        Shape(sink_pages=1, recent_pages=1),
        [(200, 1)] * 3,
        shared_prefix_pages=9,
    )
    want, _ = attend(case, backend)
    kvp, parts = 2, []
    for rank in range(kvp):
        own = of_rank(case, kvp, rank)
        # Sequences 0 and 2 are dealt alike. Of the shared pages 1 to 8 a rank has half.
        parts.append(attend(with_prefixes(own, [([0, 2], 4)]), backend))
    out, _ = merge_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
    assert (out - want).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("new", [1, 20])
def test_a_missing_page_is_named_by_its_place_in_the_sequence(backend: str, new: int) -> None:
    case = of_rank(make_case(get_format("int8"), Shape(), [(100, new)]), 2, 1)
    case.batch.sealed_tables[case.batch.rows[0], 1] = -1
    with pytest.raises(ValueError, match="logical page 3"):
        attend(case, backend)


def test_firsts_and_stride_belong_together() -> None:
    batch = of_rank(make_case(get_format("int8"), Shape(), [(100, 1)]), 2, 0).batch
    none = torch.zeros(0, dtype=torch.int32)
    for wrong in ({"stride": 1}, {"stride": 0}, {"firsts": None}, {"firsts": none}):
        with pytest.raises(ValueError, match="firsts"):
            replace(batch, **wrong)
