from __future__ import annotations

import random

import pytest

from kvmesh.cluster.routing.prefix_index import PrefixIndex


def chain(name: str, length: int) -> list[bytes]:
    return [f"{name}{i}".encode() for i in range(length)]


def test_each_group_matches_as_far_as_it_holds_the_chain() -> None:
    index = PrefixIndex()
    pages = chain("a", 100)
    index.add("x", pages[:70])
    index.add("y", pages[:7])
    index.add("z", chain("b", 10))
    assert index.match(pages) == {"x": 70, "y": 7}
    assert index.match(pages[:5]) == {"x": 5, "y": 5}
    assert index.match(chain("c", 3)) == {}
    assert index.match([]) == {}


def test_it_agrees_with_counting_one_by_one() -> None:
    chance = random.Random(1)
    for _ in range(200):
        index, pages = PrefixIndex(), chain("a", chance.randint(1, 40))
        held = {f"g{i}": chance.randint(0, len(pages)) for i in range(chance.randint(1, 9))}
        for group, length in held.items():
            index.add(group, pages[:length])
        assert index.match(pages) == {group: n for group, n in held.items() if n}


def test_evictions_and_lost_groups_are_forgotten() -> None:
    index, pages = PrefixIndex(), chain("a", 10)
    index.add("x", pages)
    index.add("y", pages)
    index.remove("x", pages[4:])
    assert index.match(pages) == {"x": 4, "y": 10}
    index.clear("y")
    assert index.match(pages) == {"x": 4}
    assert len(index) == 4


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    index = PrefixIndex(limit=10)
    index.add("x", chain("a", 6))
    index.add("x", chain("b", 4))
    index.add("x", chain("a", 6))  # used again: younger than b now
    index.add("x", chain("c", 3))
    assert len(index) == 10
    assert index.match(chain("a", 6)) == {"x": 6}
    assert index.match(chain("b", 4)) == {}
    with pytest.raises(ValueError, match="limit"):
        PrefixIndex(0)
