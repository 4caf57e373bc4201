"""Split models against whole ones, with real processes and real sums between them.

All architectures run in one pair of processes, since starting them takes most of the time.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.sizes import check_tp
from kvmesh.workers.parallel.comm import Communicator
from tests.model.cases import CASES, PROMPTS
from tests.model.ranks import (
    CPU,
    compare_models,
    run_ranks,
    save_expectation,
    sum_then_lose_a_rank,
)
from tests.model.small import make_small_model


@pytest.mark.slow
def test_two_ranks_compute_the_same_as_one(tmp_path: Path) -> None:
    expectations = [
        save_expectation(
            tmp_path / f"{case}.pt",
            make_small_model(architecture, tmp_path / case, **overrides),
            PROMPTS,
        )
        for case, (architecture, overrides) in CASES.items()
    ]
    results = run_ranks(compare_models, 2, 2 * len(CASES), expectations, (1, 2))
    assert {(case, kvp) for case, kvp, _, _ in results} == {*product(CASES, (1, 2))}
    assert [result for result in results if result[2] > 1e-4 or not result[3]] == []


@pytest.mark.slow
def test_sums_are_bitwise_equal_and_a_lost_rank_is_noticed() -> None:
    size = 4
    results = run_ranks(sum_then_lose_a_rank, size, size + (size - 1))
    answers = [result for result in results if isinstance(result, tuple)]
    sums = {rank: found for rank, found, _ in answers}
    assert all(all(exchanged) for _, _, exchanged in answers)
    assert sorted(result for result in results if isinstance(result, int)) == [0, 1, 2]
    for (total, gathered), *others in zip(*(sums[rank] for rank in range(size)), strict=True):
        parts = np.split(gathered, size, axis=-1)
        np.testing.assert_allclose(total, sum(parts), rtol=0, atol=1e-5)
        for other_total, other_gathered in others:
            assert other_total.tobytes() == total.tobytes()
            assert other_gathered.tobytes() == gathered.tobytes()


def test_tp_must_divide_the_kv_heads(tmp_path: Path) -> None:
    facts = read_facts(make_small_model("LlamaForCausalLM", tmp_path))
    for tp in (1, 2, 4):
        check_tp(facts, tp)
    for tp in (0, 3, 8):
        with pytest.raises(ConfigError, match="1, 2, 4") as caught:
            check_tp(facts, tp)
        assert caught.value.field == "tp"


def test_kvp_must_divide_what_a_share_of_the_heads_has(tmp_path: Path) -> None:
    """Of 8 heads with 8 channels each, and an MLP of 96."""
    facts = read_facts(make_small_model("LlamaForCausalLM", tmp_path))
    for tp, kvp in ((1, 2), (4, 8), (1, 32)):
        check_tp(facts, tp, kvp)
    for tp, kvp in ((1, 3), (4, 16)):
        with pytest.raises(ConfigError, match=f"1, 2, 4.*; got {kvp}") as caught:
            check_tp(facts, tp, kvp)
        assert caught.value.field == "kvp"


def test_a_rank_outside_its_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank"):
        Communicator.connect(2, 2, tmp_path / "ranks", device=CPU)
    with pytest.raises(ConfigError, match="kvp: must divide the 3 ranks"):
        Communicator.connect(2, 3, tmp_path / "ranks", device=CPU, kvp=2)
    assert Communicator.connect(0, 1, tmp_path / "unused", device=CPU).size == 1
