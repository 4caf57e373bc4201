"""Step plans as arrays, and padded decode steps against unpadded ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.seal import seal_pages
from kvmesh.kernels.write import write_hot
from kvmesh.workers.deal import PageDeal
from kvmesh.workers.last_tokens import LastTokens
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import PENDING, Chunk, RowStart, StepPlan, TableUpdate
from kvmesh.workers.rank_pages import RankPages
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.step import BlockTables, StepArrays, to_device

PAGE = 16
ALL = RankPages(1, 0, 4)
CPU = torch.device("cpu")
NOTHING = TableUpdate([], [], [])


def chunk(row: int, start: int, tokens: list[int], sample: bool = True) -> Chunk:
    return Chunk(row, start, np.array(tokens, np.int32).tobytes(), sample)


def plan_of(*chunks: Chunk, seal: tuple[int, int, int] | None = None) -> StepPlan:
    hot, sealed, pages = ([part] for part in seal) if seal else ([], [], [])
    return StepPlan(1, [], list(chunks), NOTHING, NOTHING, hot, sealed, pages)


def test_chunks_are_packed_with_their_positions_and_slots() -> None:
    hot_ids = np.full((3, 4), -1, dtype=np.int64)
    hot_ids[2, 0], hot_ids[2, 1], hot_ids[0, 3] = 7, 5, 2
    arrays = StepArrays.of(
        plan_of(chunk(2, 14, [9, 8, 7], sample=False), chunk(0, 50, [4])),
        hot_ids,
        PAGE,
        ALL,
    )
    assert arrays.input_ids.tolist() == [9, 8, 7, 4]
    assert arrays.positions.tolist() == [14, 15, 16, 50]
    assert arrays.slots.tolist() == [7 * PAGE + 14, 7 * PAGE + 15, 5 * PAGE, 2 * PAGE + 2]
    assert arrays.query_starts.tolist() == [0, 3, 4]
    assert arrays.seq_lens.tolist() == [17, 51]
    assert arrays.rows.tolist() == [2, 0]
    assert arrays.logits_rows.tolist() == [3]
    assert not arrays.is_decode


def test_tokens_that_only_the_ranks_know_are_put_in_from_where_sampling_left_them() -> None:
    hot_ids = np.zeros((4, 4), dtype=np.int64)
    tables = BlockTables(torch.zeros(4, 4), torch.zeros(4, 4), PAGE, 0, 0)
    last = LastTokens(4, CPU, Communicator.single())
    # A fault has no token; its sequence gets one that exists.
    last.put(torch.tensor([3, 0, 1]), torch.tensor([40, 41, -1], dtype=torch.int32))
    pending = [Chunk(row, 5, PENDING, True) for row in (3, 0)]
    mixed = StepArrays.of(
        plan_of(chunk(2, 14, [9, 8], sample=False), *pending, chunk(1, 3, [7])), hot_ids, PAGE, ALL
    )
    assert (mixed.num_pending, mixed.sampled_rows.tolist()) == (2, [3, 0, 1])
    assert last.put_in(to_device(mixed, tables, CPU)).tolist() == [9, 8, 40, 41, 7]
    alone = StepArrays.of(plan_of(*pending), hot_ids, PAGE, ALL)
    assert alone.is_decode and alone.sampled_rows.tolist() == [3, 0]
    assert last.put_in(to_device(alone, tables, CPU)).tolist() == [40, 41]
    # Captured graphs read every token there: known ones are put there before.
    decode = StepArrays.of(plan_of(chunk(2, 14, [9]), *pending), hot_ids, PAGE, ALL)
    last.put_known(decode)
    assert [int(last.of(row)) for row in range(4)] == [41, 0, 9, 40]


@pytest.mark.slow
def test_a_padded_decode_step_gives_the_same_results() -> None:
    """Padding writes nothing, seals nothing, and its rows of the output are empty."""
    torch.manual_seed(0)
    fmt = get_format("int8")
    heads, kv_heads, head_dim = 4, 2, 64
    lengths = [40, 17, 16]  # the last fills its page, which is sealed in this step
    hot = torch.randn(6, 2, kv_heads, PAGE, head_dim)
    sealed = torch.zeros(6, kv_heads, fmt.page_bytes(PAGE, head_dim, 4), dtype=torch.uint8)
    for page in range(4):
        seal_pages(hot, sealed, torch.tensor([page]), torch.tensor([page]), fmt=fmt)
    tables = BlockTables(
        torch.tensor([[-1, -1, 3], [-1, 4, -1], [5, -1, -1]], dtype=torch.int32),
        torch.tensor([[0, 1, -1], [2, -1, -1], [4, -1, -1]], dtype=torch.int32),
        PAGE,
        0,
        0,
    )
    plan = plan_of(*(chunk(i, n - 1, [i]) for i, n in enumerate(lengths)), seal=(5, 4, 0))
    arrays = StepArrays.of(plan, tables.hot.numpy().astype(np.int64), PAGE, ALL)
    assert arrays.is_decode
    q = torch.randn(4, heads, head_dim)
    k, v = torch.randn(2, 4, kv_heads, head_dim)

    def run(step: StepArrays) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pool, codes = hot.clone(), sealed.clone()
        tensors = to_device(step, tables, CPU)
        count = len(tensors.slots)
        write_hot(k[:count], v[:count], pool, tensors.slots)
        seal_pages(pool, codes, tensors.seal_hot, tensors.seal_sealed, fmt=fmt)
        out, _ = paged_attention(q[:count], pool, codes, tensors.batch, fmt=fmt, scale=0.125)
        return out, pool, codes

    out, pool, codes = run(arrays)
    padded_out, padded_pool, padded_codes = run(arrays.padded(4))
    torch.testing.assert_close(padded_out[:3], out)
    assert (padded_out[3] == 0).all()
    assert torch.equal(padded_pool, pool) and torch.equal(padded_codes, codes)
    assert not torch.equal(codes[4], sealed[4])


def test_a_rank_takes_its_own_pages_of_a_plan() -> None:
    """Of a row with offset 1 that is dealt to 3 ranks, rank 2 has pages 1 and 4."""
    kvp, rank, row = 3, 2, 0
    pages = RankPages(kvp, rank, 2)
    pages.start_row(RowStart(row, SamplingParams(), 0, b"", offset=1))
    assert pages.firsts(np.array([row])).tolist() == [1]
    assert pages.below(np.arange(6), np.zeros(6, np.int64)).tolist() == [0, 0, 1, 1, 1, 2]
    # Logical pages 0 to 4 in page 10 of ranks 1, 2 and 0, then in page 11 of 1 and 2.
    ids = [10 * kvp + 1, 10 * kvp + 2, 10 * kvp, 11 * kvp + 1, 11 * kvp + 2]
    rows, columns, own = pages.entries(TableUpdate([row] * 5, list(range(5)), ids))
    assert (rows.tolist(), columns.tolist(), own.tolist()) == ([0, 0], [0, 1], [10, 11])
    table = np.full((2, 2), -1)
    table[rows, columns] = own
    tokens = list(range(PAGE - 1, 4 * PAGE + 2))
    plan = StepPlan(
        1,
        [],
        [chunk(row, tokens[0], tokens)],
        NOTHING,
        NOTHING,
        seal_hot=ids[:2],
        seal_sealed=[5 * kvp + 1, 6 * kvp + 2],
        seal_pages=[0, 1],
    )
    arrays = StepArrays.of(plan, table, PAGE, pages)
    slots = dict(zip(arrays.positions.tolist(), arrays.slots.tolist(), strict=True))
    here = {position: slot for position, slot in slots.items() if slot >= 0}
    assert here == {
        **{PAGE + i: 10 * PAGE + i for i in range(PAGE)},
        **{4 * PAGE + i: 11 * PAGE + i for i in range(2)},
    }
    assert arrays.seal_hot.tolist() == [10] and arrays.seal_sealed.tolist() == [6]
    assert arrays.seal_positions.tolist() == [PAGE]
    assert arrays.firsts is not None and arrays.firsts.tolist() == [1]


@pytest.mark.parametrize("kvp", [1, 2, 3, 8])
def test_pages_are_dealt_in_turn(kvp: int) -> None:
    for offset in range(kvp):
        deal = PageDeal(kvp, offset)
        ranks = [(page + offset) % kvp for page in range(40)]
        assert [deal.rank_of(page) for page in range(40)] == ranks
        for first, end in ((0, 0), (0, 1), (3, 20), (7, 40)):
            counts = [ranks[first:end].count(rank) for rank in range(kvp)]
            assert deal.counts(range(first, end)) == counts
        for rank in range(kvp):
            assert deal.first_from(5, rank) == ranks.index(rank, 5)
