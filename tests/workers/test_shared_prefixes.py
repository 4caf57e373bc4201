"""Which sequences read sealed pages together, and that the output does not change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given

from kvmesh.workers import shared_prefixes
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import local_executor
from kvmesh.workers.shared_prefixes import (
    MIN_SAVED_PAGES,
    Ints,
    PrefixFinder,
    PrefixSets,
    num_starts,
)
from tests.exercised import Exercised
from tests.model.small import VOCAB_SIZE, make_small_model
from tests.scenarios import SEEDS, scenarios
from tests.workers.invariance import Invariance, generate

PAGES = 40


def tables(*sequences: list[int]) -> Ints:
    ids = np.full((len(sequences), PAGES), -1, dtype=np.int64)
    for row, pages in enumerate(sequences):
        ids[row, : len(pages)] = pages
    return ids


def find(
    ids: Ints, *, first_page: int = 0, min_members: int = 2, max_members: int = 8
) -> PrefixSets | None:
    stops = first_page + (ids[:, first_page:] >= 0).sum(1)
    starts = np.full_like(stops, first_page)
    return PrefixFinder(ids, min_members, max_members).find(np.arange(len(ids)), starts, stops)


def sets_of(found: PrefixSets | None) -> list[tuple[list[int], int]]:
    if found is None:
        return []
    parts = np.split(found.members, found.starts[1:-1])
    return [(part.tolist(), int(found.pages[part[0]])) for part in parts]


def own(start: int, count: int = 10) -> list[int]:
    return list(range(start, start + count))


def test_sequences_with_the_same_pages_read_them_together() -> None:
    shared = own(100)
    ids = tables(shared + own(200), own(300), shared + own(400), shared)
    assert sets_of(find(ids)) == [([0, 2, 3], 10)]
    found = find(ids)
    assert found is not None
    assert found.pages.tolist() == [10, 0, 10, 10]


def test_a_short_common_prefix_is_not_worth_it() -> None:
    few = own(100, MIN_SAVED_PAGES // 2)
    assert find(tables(few + own(200), few + own(300))) is None
    assert sets_of(find(tables(*(few + own(200 * i) for i in range(2, 5))))) == [
        ([0, 1, 2], len(few))
    ]
    assert find(tables(own(100), own(200))) is None


def test_pages_of_the_sink_do_not_count() -> None:
    shared = own(100)
    ids = tables([7, *shared, 1], [8, *shared, 2])
    assert find(ids) is None
    assert sets_of(find(ids, first_page=1)) == [([0, 1], 10)]


def test_of_nested_prefixes_the_one_that_saves_more_is_used() -> None:
    system = own(100, 2)
    document, other = own(200, 20), own(300, 20)
    # Two documents, each read by two sequences; the prefix that all share is shorter.
    four = [system + document + own(400), system + document + own(500)]
    four += [system + other + own(600), system + other + own(700)]
    assert sets_of(find(tables(*four))) == [([0, 1], 22), ([2, 3], 22)]
    # Many share the system prompt, and two a document: both sets.
    many = [system + own(1000 + 100 * i) for i in range(8)]
    assert sets_of(find(tables(*four[:2], *many))) == [([0, 1], 22), (list(range(2, 10)), 2)]
    # One more common page is not worth leaving the others.
    close = [[*own(100), 1, 0], [*own(100), 1, 1], [*own(100), 2, 9]]
    assert sets_of(find(tables(*close))) == [([0, 1, 2], 10)]


def test_large_sets_are_split_and_small_ones_are_not_made() -> None:
    shared = own(100)
    nine = tables(*(shared + own(200 + 20 * i) for i in range(9)))
    assert [len(members) for members, _ in sets_of(find(nine, max_members=4))] == [4, 4]
    assert [len(members) for members, _ in sets_of(find(nine, max_members=5, min_members=4))] == [
        5,
        4,
    ]
    found = find(nine, max_members=6, min_members=4)
    assert sets_of(found) == [([0, 1, 2, 3, 4, 5], 10)]
    assert found is not None
    assert found.pages[6:].tolist() == [0, 0, 0]
    assert find(nine, max_members=12, min_members=10) is None


def test_a_nested_set_must_be_large_enough_too() -> None:
    documents = [[*own(100), *own(200, 15), i] for i in range(2)]
    ids = tables(*documents, [*own(100), 5], [*own(100), 6])
    assert sets_of(find(ids)) == [([0, 1], 25), ([2, 3], 10)]
    assert sets_of(find(ids, min_members=3)) == [([0, 1, 2, 3], 10)]


def test_an_answer_is_cached_until_sequences_or_tables_change() -> None:
    shared = own(100)
    ids = tables(shared + own(200), shared + own(300))
    finder = PrefixFinder(ids, 2, 8)
    rows, starts, stops = np.arange(2), np.zeros(2, np.int64), np.array([20, 20])
    found = finder.find(rows, starts, stops)
    assert finder.find(rows, starts, stops) is found
    assert finder.find(rows, starts, np.array([20, 0])) is None
    ids[1, 4] = 999
    finder.note_update()
    assert sets_of(finder.find(rows, starts, stops)) == []


def test_padding_adds_empty_sets() -> None:
    shared = own(100)
    found = find(tables(shared + own(200), shared + own(300), own(400)))
    assert found is not None
    padded = found.padded(8)
    assert padded.pages.tolist() == [10, 10, 0, 0, 0, 0, 0, 0]
    assert len(padded.members) == 8
    assert padded.starts.tolist() == [0, 2, 2, 2, 2]
    assert len(padded.starts) == num_starts(8)


SEEN = Exercised(
    "shared prefixes",
    {
        "sets": 250,
        "nested sets": 80,
        "sequences that read alone": 200,
        "sets too small to be worth it": 120,
        "sets that are split": 40,
    },
)


@SEEN.required
@scenarios(300)
@given(seed=SEEDS)
def test_sets_are_valid_and_save_at_least_as_much_as_one_per_first_page(seed: int) -> None:
    """Each number is a branch, followed by three pages that it determines."""
    chance = Random(seed)
    paths = [
        [chance.choice([0, 0, 0, 0, 1, 2]) for _ in range(chance.randrange(1, 13))]
        for _ in range(chance.randrange(2, 13))
    ]
    limit = chance.randrange(2, 6)
    names: dict[tuple[int, ...], int] = {}

    def page_ids(path: list[int]) -> list[int]:
        pages = []
        for depth in range(len(path)):
            node = names.setdefault(tuple(path[: depth + 1]), len(names))
            pages += [4 * node, 4 * node + 1, 4 * node + 2]
        return pages

    ids = tables(*map(page_ids, paths))
    whole = find(ids, max_members=len(paths) + 2)
    assert all((len(members) - 1) * n >= MIN_SAVED_PAGES for members, n in sets_of(whole))
    # Sets that are too small to be worth it count as well.
    with patch.object(shared_prefixes, "MIN_SAVED_PAGES", 1):
        all_sets = sets_of(find(ids, max_members=len(paths) + 2))
    assert {str(x) for x in sets_of(whole)} <= {str(x) for x in all_sets}
    seen: list[int] = []
    saved: Counter[int] = Counter()
    for members, common in all_sets:
        assert (ids[members, :common] == ids[members[0], :common]).all()
        assert (ids[members, :common] >= 0).all()
        saved[paths[members[0]][0]] += (len(members) - 1) * common
        seen += members
    assert len(seen) == len(set(seen))
    firsts = [paths[members[0]][0] for members, _ in all_sets]
    SEEN.add("sets", len(firsts))
    SEEN.add("nested sets", len(firsts) - len({*firsts}))
    SEEN.add("sequences that read alone", len(paths) - len(seen))
    for first in range(3):
        group = [i for i, path in enumerate(paths) if path[0] == first]
        if len(group) > 1:
            table = ids[group]
            same = (table == table[0]).all(0) & (table[0] >= 0)
            common = int(np.append(same, False).argmin())
            assert saved[first] >= (len(group) - 1) * common
    cut = find(ids, max_members=limit)
    assert all(2 <= len(members) <= limit for members, _ in sets_of(cut))
    SEEN.add("sets too small to be worth it", len(all_sets) - len(sets_of(whole)))
    SEEN.add("sets that are split", any(len(members) > limit for members, _ in sets_of(whole)))
    if cut is not None:
        assert len(cut.starts) <= num_starts(len(paths))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(
        "LlamaForCausalLM",
        tmp_path_factory.mktemp("small"),
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", ["exact", "int8", "k4v2"])
def test_output_is_the_same_when_prefixes_are_read_together(
    kv_format: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        model=str(model),
        kv_format=kv_format,
        kv_probe="off",
        page_size=16,
        dtype="float32",
        device="cpu",
        kv_memory_bytes=16 << 20,
        max_num_batched_tokens=64,
        threads_per_rank=1,
    )
    numbers = np.random.default_rng(0)
    document = numbers.integers(3, VOCAB_SIZE, 250).tolist()
    prompts = [
        document + numbers.integers(3, VOCAB_SIZE, length).tolist() for length in (5, 60, 21)
    ]
    alone = Invariance(config, prompts, 24)
    steps: list[PrefixSets | None] = []
    search = PrefixFinder.find

    def recorded(self: PrefixFinder, rows: Ints, starts: Ints, stops: Ints) -> PrefixSets | None:
        steps.append(search(self, rows, starts, stops))
        return steps[-1]

    monkeypatch.setattr(PrefixFinder, "find", recorded)
    engine = Engine(config, local_executor(config))
    alone.check(alone.one_by_one(engine))
    assert not any(steps)
    alone.check(generate(engine, prompts, 24))
    together = [found for found in steps if found is not None]
    assert len(together) > 20
    assert max(len(found.members) for found in together) == 3
