"""Which pages of earlier sequences a prompt finds, and what eviction and withdrawal leave."""

from __future__ import annotations

import hashlib
from random import Random

import numpy as np
import pytest
from hypothesis import given

from kvmesh.workers.prefix_cache import PageDigests, PrefixCache
from kvmesh.workers.sizes import PageGeometry
from tests.exercised import Exercised
from tests.scenarios import SEEDS, scenarios
from tests.workers.watched_cache import longest_hit

PAGE = 16
SEEN = Exercised(
    "prefix cache",
    {
        "hits": 200,
        "misses": 100,
        "hits of a part": 100,
        "hits beyond a page without a hot form": 50,
    },
)


def make_cache(
    *, sink: int = 0, recent: int = 0, hot: int = 40, sealed: int = 40, enabled: bool = True
) -> PrefixCache:
    return PrefixCache(PageGeometry(PAGE, sink, recent, 4, 1), hot, sealed, enabled)


def digest(number: int) -> bytes:
    return b"%d" % number


def hold(cache: PrefixCache, number: int, forms: str = "hs") -> dict[str, int]:
    """A used page of each form (h, s) that can be found; returns the pages."""
    pages = {}
    for form, arena in (("h", cache.hot), ("s", cache.sealed)):
        if form in forms:
            pages[form] = arena.take(0)
            arena.name(pages[form], digest(number))
    return pages


def release(cache: PrefixCache, pages: dict[str, int]) -> None:
    for form, page in pages.items():
        {"h": cache.hot, "s": cache.sealed}[form].release(page, 0.0)


@SEEN.required
@scenarios(800)
@given(seed=SEEDS)
def test_the_longest_usable_prefix_is_found(seed: int) -> None:
    chance = Random(seed)
    cache = make_cache(sink=chance.randrange(3), recent=chance.randrange(3))
    pages = [chance.choice(["hs", "hs", "hs", "h", "s", "s", ""]) for _ in range(12)]
    for number, forms in enumerate(pages):
        hold(cache, number, forms)
    numbers = range(chance.randrange(1, 13))
    hit = cache.match([digest(number) for number in numbers])
    assert hit == longest_hit(cache, [digest(number) for number in numbers])
    SEEN.add("hits" if hit.num_pages else "misses")
    if hit.num_pages:
        SEEN.add("hits of a part", hit.num_pages < len(numbers))
        cold = [forms for forms in pages[: hit.num_pages] if "h" not in forms]
        SEEN.add("hits beyond a page without a hot form", bool(cold))
    cache.check()


def test_digests_cover_all_tokens_before_them_and_the_salt() -> None:
    tokens = np.arange(3 * PAGE + 5, dtype=np.int32)
    digests = PageDigests(PAGE, "salt")
    expected = []
    last = hashlib.blake2b(b"salt", digest_size=16).digest()
    for page in range(3):
        block = tokens[page * PAGE : (page + 1) * PAGE].tobytes()
        last = hashlib.blake2b(last + block, digest_size=16).digest()
        expected.append(last)
    assert digests.upto(tokens, 1) == expected[:1]
    assert digests.upto(tokens, 3) == expected
    assert digests.upto(tokens, 2) == expected, "those that are known"
    assert PageDigests(PAGE, "salt").upto(tokens.astype(np.int64), 3) == expected
    assert not {*PageDigests(PAGE, "").upto(tokens, 3)} & {*expected}


def test_the_first_page_with_given_contents_is_the_one_that_is_found() -> None:
    cache = make_cache(recent=1)
    first, second = hold(cache, 1), hold(cache, 1)
    hit = cache.match([digest(1)])
    assert hit.hot == {0: first["h"]}
    assert cache.sealed.find(digest(1)) == first["s"]
    cache.check()
    release(cache, second)
    assert (cache.hot.cached, cache.sealed.cached) == (0, 0), "duplicates are not kept"
    release(cache, first)
    assert (cache.hot.cached, cache.sealed.cached) == (1, 1)


@pytest.mark.parametrize(("evicted", "kept"), [("h", "s"), ("s", "h")])
def test_a_form_stays_when_the_other_is_evicted(evicted: str, kept: str) -> None:
    cache = make_cache(sink=1, hot=1 if evicted == "h" else 2, sealed=1 if evicted == "s" else 2)
    release(cache, hold(cache, 1))
    {"h": cache.hot, "s": cache.sealed}[evicted].take(0)
    cache.check()
    assert (cache.sealed.find(digest(1)) is None) == (evicted == "s")
    assert cache.match([digest(1)]).num_pages == (kept == "h"), "the sink is read hot"
    {"h": cache.hot, "s": cache.sealed}[kept].take(0)
    {"h": cache.hot, "s": cache.sealed}[kept].take(0)
    cache.check()
    assert not cache.hot.named and not cache.sealed.named


def test_hot_pages_are_kept_only_where_a_window_needs_them() -> None:
    for sink, recent in ((0, 0), (1, 0), (0, 1)):
        cache = make_cache(sink=sink, recent=recent)
        release(cache, hold(cache, 1, "h"))
        assert cache.hot.cached == (sink + recent > 0)


def test_a_cache_that_is_off_finds_nothing() -> None:
    cache = make_cache(recent=1, enabled=False)
    pages = hold(cache, 1)
    cache.note_block(digest(1))
    assert cache.match([digest(1)]).num_pages == 0
    assert cache.sealed.find(digest(1)) is None
    assert cache.take_changes() == {}
    release(cache, pages)
    assert (cache.hot.cached, cache.sealed.cached) == (0, 0)


def test_withdrawn_pages_are_not_found_but_stay_with_their_holders() -> None:
    cache = make_cache(recent=1)
    used, cached, other = hold(cache, 1), hold(cache, 2), hold(cache, 3)
    release(cache, cached)
    for number in (1, 2):
        cache.note_block(digest(number))
    cache.take_changes()
    cache.withdraw([digest(number) for number in (1, 2, 9)])
    cache.check()
    for number in (1, 2):
        assert cache.match([digest(number)]).num_pages == 0
        assert cache.sealed.find(digest(number)) is None
    assert cache.sealed.find(digest(3)) == other["s"]
    assert cache.take_changes() == {digest(1): False, digest(2): False}
    assert (cache.hot.used, cache.hot.cached, cache.sealed.used, cache.sealed.cached) == (
        2,
        0,
        2,
        0,
    )
    release(cache, used)
    assert (cache.hot.cached, cache.sealed.cached) == (0, 0)


def test_pages_that_are_cached_already_are_evicted_last_while_they_are_pinned() -> None:
    cache = make_cache()
    pages = [hold(cache, number, "s") for number in range(3)]
    for page in pages:
        release(cache, page)
    arena = cache.sealed
    arena.pin(digest(0))
    arena.pin(digest(1))
    assert arena.parts[0].eviction_order == [pages[number]["s"] for number in (2, 0, 1)]
    arena.pin(digest(2))
    assert arena.parts[0].eviction_order == [pages[number]["s"] for number in (0, 1, 2)]
    arena.unpin(digest(1))
    assert arena.parts[0].eviction_order == [pages[number]["s"] for number in (1, 0, 2)]


def test_a_block_is_reported_when_it_is_cached_and_when_its_last_form_is_gone() -> None:
    cache = make_cache(recent=1, hot=1, sealed=1)
    cache.note_block(digest(1))
    assert cache.take_changes() == {}, "it is not cached"
    pages = hold(cache, 1)
    cache.note_block(digest(1))
    cache.note_block(digest(1))
    assert cache.take_changes() == {digest(1): True}
    cache.note_block(digest(1))
    assert cache.take_changes() == {}, "it was reported"
    release(cache, pages)
    cache.hot.take(0)
    assert cache.take_changes() == {}, "its sealed form is still there"
    sealed = cache.sealed.take(0)
    assert cache.take_changes() == {digest(1): False}
    cache.sealed.release(sealed, 0.0)
    again = hold(cache, 1, "s")
    cache.note_block(digest(1))
    release(cache, again)
    cache.sealed.take(0)
    assert cache.take_changes() == {digest(1): False}, "the latest state"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cache: cache.hot._pages.pop(digest(1)), "cannot be found"),
        (lambda cache: cache.sealed._pages.pop(digest(1)), "cannot be found"),
        (lambda cache: cache.sealed._pages.update({digest(1): 7}), "cannot be found"),
        (lambda cache: cache.sealed._pages.update({digest(2): 0}), "cannot be found"),
        (lambda cache: cache._blocks.add(digest(2)), "not cached"),
        (lambda cache: cache.hot.parts[0]._free.pop(), "lost"),
        (lambda cache: cache.sealed.parts[0]._free.pop(), "lost"),
    ],
)
def test_the_audit_finds_damage(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    cache = make_cache(recent=1)
    hold(cache, 1)
    cache.check()
    damage(cache)
    with pytest.raises(AssertionError, match=message):
        cache.check()
