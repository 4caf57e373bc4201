"""Pages of an arena under any sequence of calls, next to a model of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import pytest
from hypothesis import given

from kvmesh.workers.arena import Arena
from tests.exercised import Exercised
from tests.scenarios import SEEDS, check, scenarios

SEEN = Exercised(
    "arena",
    {
        "takes": 1500,
        "evictions": 300,
        "evictions out of the order of release": 50,
        "refused takes": 800,
        "shares of a cached page": 200,
        "names taken from a cached page": 100,
        "names taken from a used page": 300,
    },
)


class ArenaMachine:
    """An arena and what its pages must be: their holders, their keys, the order of release."""

    def __init__(self, total: int) -> None:
        self.evicted: list[bytes] = []
        self.arena = Arena(total, self.evicted.append)
        self.holders = [0] * total
        self.keys: dict[int, bytes] = {}
        self.cached: list[int] = []  # in the order in which they were released
        self.worths, self.shares = [0.0] * total, [0] * total
        self.ranks: dict[int, float] = {}
        self.age = 0.0
        self.made = 0

    def call(self, what: str, index: int) -> None:
        getattr(self, what)(index)
        used = sum(count > 0 for count in self.holders)
        free = len(self.holders) - used - len(self.cached)
        arena = self.arena
        assert (arena.used, arena.cached, arena.free) == (used, len(self.cached), free)
        assert (arena.total, arena.available) == (len(self.holders), free + len(self.cached))
        assert arena.named == {key: page for page, key in self.keys.items()}
        order = sorted(self.cached, key=lambda page: self.ranks[page])  # stable
        assert arena.eviction_order == order
        arena.check()

    def take(self, index: int) -> None:
        free = {p for p, n in enumerate(self.holders) if not n} - {*self.cached}
        if not free and not self.cached:
            SEEN.add("refused takes")
            with pytest.raises(IndexError, match="no page available"):
                self.arena.take()
            return
        page = self.arena.take()
        SEEN.add("takes")
        if free:
            assert page in free and not self.evicted, "a page is evicted while others are free"
        else:
            SEEN.add("evictions")
            lowest = min(self.ranks[other] for other in self.cached)
            expected = next(other for other in self.cached if self.ranks[other] == lowest)
            if expected != self.cached[0]:
                SEEN.add("evictions out of the order of release")
            assert page == expected
            self.cached.remove(page)
            self.age = lowest
            assert self.evicted == [self.keys.pop(page)]
            self.evicted.clear()
        self.holders[page] = 1
        self.worths[page], self.shares[page] = 0.0, 0

    def name(self, index: int) -> None:
        for page in self.pick(index, lambda p: self.holders[p] > 0 and p not in self.keys):
            self.made += 1
            self.keys[page] = b"%d" % self.made
            self.arena.name(page, self.keys[page])

    def unname(self, index: int) -> None:
        for page in self.pick(index, lambda p: p in self.keys):
            cached = page in self.cached
            SEEN.add(f"names taken from a {'cached' if cached else 'used'} page")
            self.arena.unname(page)
            assert self.evicted == [self.keys.pop(page)]
            self.evicted.clear()
            if cached:
                self.cached.remove(page)

    def share(self, index: int) -> None:
        for page in self.pick(index, lambda p: self.holders[p] > 0 or p in self.cached):
            assert self.arena.share(page) == page
            self.holders[page] += 1
            self.shares[page] += 1
            if page in self.cached:
                SEEN.add("shares of a cached page")
                self.cached.remove(page)

    def release(self, index: int) -> None:
        for page in self.pick(index, lambda p: self.holders[p] > 0):
            worth = float(index % 4)
            self.arena.release(page, worth)
            self.let_go(page, worth)

    def unshare(self, index: int) -> None:
        for page in self.pick(index, lambda p: self.holders[p] > 0 and self.shares[p] > 0):
            self.arena.unshare(page)
            self.shares[page] -= 1
            self.let_go(page, 0.0)

    def let_go(self, page: int, worth: float) -> None:
        self.holders[page] -= 1
        self.worths[page] = max(self.worths[page], worth)
        if not self.holders[page] and page in self.keys:
            self.ranks[page] = self.age + self.worths[page] * (1 + self.shares[page])
            self.cached.append(page)

    def pick(self, index: int, fits: Callable[[int], bool]) -> list[int]:
        """One of the pages that fit, if there is one."""
        found = [page for page in range(len(self.holders)) if fits(page)]
        return [found[index % len(found)]] if found else []


@SEEN.required
@scenarios(150)
@given(seed=SEEDS)
def test_pages_are_taken_shared_and_evicted_in_order(seed: int) -> None:
    chance = Random(seed)
    total = chance.randrange(1, 7)
    weights = {"take": 4, "name": 3, "share": 3, "release": 5, "unshare": 1, "unname": 1}

    def run(calls: Sequence[tuple[str, int]]) -> None:
        machine = ArenaMachine(total)
        for what, index in calls:
            machine.call(what, index)

    names = chance.choices([*weights], [*weights.values()], k=120)
    check(run, [(name, chance.randrange(20)) for name in names])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arena: arena._free.append(arena._free[-1]), "free list twice"),
        (lambda arena: arena._free.append(0), "in two states"),
        (lambda arena: arena._free.pop(), "is lost"),
        (lambda arena: arena._keys.pop(1), "no page"),
        (lambda arena: arena._keys.update({2: b"x"}), "no page"),
        (lambda arena: arena._keys.update({0: b"cached"}), "same key"),
    ],
)
def test_the_audit_finds_damage(damage: Callable[[Arena], object], message: str) -> None:
    """Page 0 is used, page 1 cached, pages 2 and 3 are free."""
    arena = Arena(4)
    held, cached = arena.take(), arena.take()
    assert (held, cached) == (0, 1)
    arena.name(cached, b"cached")
    arena.release(cached)
    arena.check()
    damage(arena)
    with pytest.raises(AssertionError, match=message):
        arena.check()


@pytest.mark.parametrize("misuse", ["release", "name"])
def test_pages_without_a_holder_cannot_be_released_or_named(misuse: str) -> None:
    arena = Arena(2)
    call = partial(arena.name, key=b"x") if misuse == "name" else arena.release
    with pytest.raises(AssertionError):
        call(0)


def test_shares_and_releases_leave_no_trace() -> None:
    """A page that is held again and again leaves outdated entries, which are cleared away."""
    arena = Arena(4)
    page = arena.take()
    arena.name(page, b"x")
    arena.release(page)
    for _ in range(1000):
        arena.release(arena.share(page))
        assert len(arena._heap) <= 2 * 4
    assert arena.eviction_order == [page]
    arena.check()
