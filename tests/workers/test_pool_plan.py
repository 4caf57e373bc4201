"""How a rank's KV memory is divided."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.page_geometry import KVShape, geometry_of
from kvmesh.workers.pool_plan import plan_pool, pool_for
from kvmesh.workers.sizes import PageGeometry

# Four hot pages per sequence, each as large as eight sealed ones.
GEOMETRY = PageGeometry(
    page_size=64, sink_pages=1, recent_pages=2, hot_page_bytes=800, sealed_page_bytes=100
)


@pytest.mark.parametrize(("share", "seqs"), [(0.5, 5), (0.8, 9), (0.1, 1)])
def test_hot_pages_take_no_more_than_their_share(share: float, seqs: int) -> None:
    budget = 40_000
    plan = plan_pool(
        budget, GEOMETRY, max_num_seqs=100, max_num_batched_tokens=128, max_hot_share=share
    )
    assert plan.max_num_seqs == seqs
    assert plan.hot_pages == 4 * seqs
    hot_bytes = 800 * plan.hot_total
    assert hot_bytes <= share * budget or seqs == 1
    assert budget - 100 < hot_bytes + 100 * plan.sealed_pages <= budget


def test_states_of_sequences_are_part_of_the_memory() -> None:
    geometry = replace(GEOMETRY, state_bytes=1_000)
    plan = plan_pool(40_000, geometry, max_num_seqs=100, max_num_batched_tokens=128)
    assert plan.max_num_seqs == 4  # of 4 hot pages and a state each; 5 without states
    assert 40_000 - 100 < plan.num_bytes(geometry) <= 40_000
    assert plan.num_bytes(geometry) - plan.num_bytes(GEOMETRY) == 4_000
    need = geometry.need(1000)
    assert geometry.bytes_of(need, 3) == geometry.bytes_of(need) + 3_000
    with pytest.raises(ConfigError, match="5,100 bytes"):
        plan_pool(5_000, geometry, max_num_seqs=1, max_num_batched_tokens=64)


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (64, 1), (65, 2), (130, 3)])
def test_a_step_has_hot_pages_for_all_its_tokens(tokens: int, pages: int) -> None:
    plan = plan_pool(40_000, GEOMETRY, max_num_seqs=2, max_num_batched_tokens=tokens)
    assert plan.headroom_pages == pages
    assert plan.hot_total == plan.hot_pages + pages


def test_the_tokens_of_a_step_take_at_most_half_of_the_hot_pages() -> None:
    plan = plan_pool(40_000, GEOMETRY, max_num_seqs=100, max_num_batched_tokens=100_000)
    assert (plan.hot_total, plan.headroom_pages, plan.max_num_seqs) == (12 + 12, 12, 3)
    small = plan_pool(5_000, GEOMETRY, max_num_seqs=100, max_num_batched_tokens=100_000)
    assert (small.hot_pages, small.headroom_pages, small.max_num_seqs) == (4, 1, 1)


@pytest.mark.parametrize(("budget", "sealed"), [(4_100, 1), (4_099, None), (4_199, 1), (4_200, 2)])
def test_the_smallest_budget_holds_one_sequence_and_a_sealed_page(
    budget: int, sealed: int | None
) -> None:
    arguments: dict[str, int] = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    if sealed is None:
        with pytest.raises(ConfigError, match=r"needs 4,100 bytes \(5 hot pages of 800") as caught:
            plan_pool(budget, GEOMETRY, **arguments)
        assert caught.value.field == "kv_memory_bytes"
    else:
        plan = plan_pool(budget, GEOMETRY, **arguments)
        assert (plan.hot_total, plan.sealed_pages, plan.max_num_seqs) == (5, sealed, 1)


@pytest.mark.parametrize("state_bytes", [0, 100_000])
@pytest.mark.parametrize("windows", [(0, 0), (1, 8)])
@pytest.mark.parametrize("step_tokens", [1, 100_000])
def test_what_a_budget_is_said_to_need_is_enough(
    state_bytes: int, windows: tuple[int, int], step_tokens: int
) -> None:
    sink, recent = windows
    geometry = replace(GEOMETRY, sink_pages=sink, recent_pages=recent, state_bytes=state_bytes)
    with pytest.raises(ConfigError) as caught:
        plan_pool(1, geometry, max_num_seqs=8, max_num_batched_tokens=step_tokens)
    said = re.search(r"which needs ([\d,]+) bytes", str(caught.value))
    assert said is not None
    needed = int(said[1].replace(",", ""))
    for budget in range(needed, needed + 20_000, 700):
        plan = plan_pool(budget, geometry, max_num_seqs=8, max_num_batched_tokens=step_tokens)
        assert plan.num_bytes(geometry) <= budget
    with pytest.raises(ConfigError, match=f"needs {needed:,} bytes"):
        plan_pool(needed - 1, geometry, max_num_seqs=8, max_num_batched_tokens=step_tokens)


def test_few_sequences_leave_the_rest_to_sealed_pages() -> None:
    plan = plan_pool(40_000, GEOMETRY, max_num_seqs=2, max_num_batched_tokens=128)
    assert (plan.hot_pages, plan.headroom_pages, plan.sealed_pages) == (8, 2, 320)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_of_zero_or_one_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="max_hot_share"):
        EngineConfig(model="m", max_hot_share=share)


def test_prefixes_have_hot_pages_of_their_own_where_windows_are_exact() -> None:
    budget = 1_000_000
    plan = plan_pool(budget, GEOMETRY, max_num_seqs=2, max_num_batched_tokens=128)
    held = (2 * 4 + 2) * 800
    assert (plan.hot_pages, plan.headroom_pages, plan.cached_pages) == (8, 2, 8)
    assert plan.hot_total == 18
    assert plan.sealed_pages == (budget - held - 8 * 800) // 100
    # No more than a fiftieth of what is left.
    few = plan_pool(100_000, GEOMETRY, max_num_seqs=2, max_num_batched_tokens=128)
    assert few.cached_pages == 2 == int((100_000 - held) * 0.02) // 800
    without = replace(GEOMETRY, sink_pages=0, recent_pages=0)
    plan = plan_pool(budget, without, max_num_seqs=2, max_num_batched_tokens=128)
    assert plan.cached_pages == 0
    # Between two ranks, one hot page each is a window of two.
    dealt = replace(GEOMETRY, sink_pages=0, recent_pages=1, ranks=2, kvp=2)
    plan = plan_pool(budget, dealt, max_num_seqs=2, max_num_batched_tokens=128)
    assert plan.cached_pages == 2


@pytest.mark.parametrize("kv_format", ["exact", "int8", "k4v4", "k2v2", "int4"])
@pytest.mark.parametrize("sequences", [1, 3, 48])
@pytest.mark.parametrize("tokens", [1, 63, 64, 2048, 100_000])
@pytest.mark.parametrize("step_tokens", [1, 512, 8192])
def test_a_pool_for_sequences_is_what_the_engine_plans(
    kv_format: str, sequences: int, tokens: int, step_tokens: int
) -> None:
    geometry = geometry_of(get_format(kv_format), KVShape(2, 4, 64), page_size=64, itemsize=4, tp=2)
    pool = pool_for(
        geometry, sequences=sequences, tokens=tokens, max_num_batched_tokens=step_tokens
    )
    planned = plan_pool(
        pool.num_bytes(geometry),
        geometry,
        max_num_seqs=1000,
        max_num_batched_tokens=step_tokens,
        max_hot_share=pool.hot_share(geometry),
    )
    # More sequences may run than were asked for, if hot pages are all that they need.
    assert planned.max_num_seqs >= sequences
    assert planned.hot_pages + planned.headroom_pages == pool.hot_pages + pool.headroom_pages
    need = geometry.peak_need(tokens)
    assert planned.sealed_pages == pool.sealed_pages >= sequences * need.sealed
    exactly = plan_pool(
        pool.num_bytes(geometry),
        geometry,
        max_num_seqs=sequences,
        max_num_batched_tokens=step_tokens,
        max_hot_share=pool.hot_share(geometry),
    )
    assert exactly == pool
