"""A prefix cache whose every answer is compared with a search that tries every length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmesh.workers.arena import Arena
from kvmesh.workers.prefix_cache import Digest, PrefixCache, PrefixHit


def watch(cache: PrefixCache, happened: Callable[[str], None]) -> None:
    """Check what the cache does from now on, and report it to `happened`."""
    named: set[Digest] = set()
    match, name_sealed = cache.match, cache.sealed.name

    def matching(digests: Sequence[Digest]) -> PrefixHit:
        hit = match(digests)
        assert hit == longest_hit(cache, digests)
        kvp = cache._geometry.kvp
        offsets = {(i - page) % kvp for x in (hit.hot, hit.sealed) for page, i in x.items()}
        assert len(offsets) <= 1, "a prefix is dealt in two ways"
        if hit.num_pages:
            happened("prefix hits")
            if hit.num_pages == len(digests):
                happened("hits of a whole prompt")
            if any(x in named and x not in cache for x in digests[hit.num_pages :]):
                happened("partly evicted prefixes")
        return hit

    def naming(page: int, key: Digest) -> None:
        named.add(key)
        name_sealed(page, key)

    def counting(forget: Callable[[Digest], None]) -> Callable[[Digest], None]:
        def evict(digest: Digest) -> None:
            forget(digest)
            happened("evictions")
            if digest in cache:
                happened("one form evicted, the other kept")

        return evict

    def sparing(arena: Arena) -> Callable[[], int]:
        evict = arena._evict

        def evicting() -> int:
            others = any(arena._keys[page] not in arena._pinned for page in arena._cached)
            before = arena.pinned_evictions
            page = evict()
            if arena.pinned_evictions > before:
                assert not others, "a pinned page was evicted before others"
                happened("pinned pages that were needed")
            return page

        return evicting

    cache.match = matching  # type: ignore[method-assign]
    cache.sealed.name = naming  # type: ignore[method-assign]
    for arena in (*cache.hot.parts, *cache.sealed.parts):
        arena._on_evict = counting(arena._on_evict)
        arena._evict = sparing(arena)  # type: ignore[method-assign]


def longest_hit(cache: PrefixCache, digests: Sequence[Digest]) -> PrefixHit:
    """The hit of the most pages: the sink and the recent window hot, what is between sealed."""
    sink, recent = cache._geometry.sink_pages, cache._geometry.recent_pages
    for length in range(len(digests), 0, -1):
        hot, sealed = dict[int, int | None](), dict[int, int | None]()
        for page, digest in enumerate(digests[:length]):
            exact = page < sink or page >= length - recent
            arena, pages = (cache.hot, hot) if exact else (cache.sealed, sealed)
            pages[page] = arena.named.get(digest)
        if None not in [*hot.values(), *sealed.values()]:
            return PrefixHit(length, _known(hot), _known(sealed))
    return PrefixHit(0, {}, {})


def _known(pages: dict[int, int | None]) -> dict[int, int]:
    return {page: page_id for page, page_id in pages.items() if page_id is not None}
