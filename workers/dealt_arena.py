"""The arenas of the kvp ranks to which pages are dealt, as one. With kvp = 1 it is an arena."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kvmesh.workers.arena import Arena, Key


class DealtArena:
    """Page ids name a rank and a page of its arena, see deal.py.

    total: pages of one rank; all have as many
    parts: each rank's arena
    pinned: keys whose pages are evicted after all others, and how often each was pinned
    """

    def __init__(self, total: int, kvp: int, on_evict: Callable[[Key], None]) -> None:
        self.total = total
        self.kvp = kvp
        self.pinned: Counter[Key] = Counter()
        self.parts = tuple(Arena(total, on_evict, self.pinned) for _ in range(kvp))

    @property
    def used(self) -> int:
        """Pages of all ranks together."""
        return sum(part.used for part in self.parts)

    @property
    def cached(self) -> int:
        """Pages of all ranks together."""
        return sum(part.cached for part in self.parts)

    @property
    def available(self) -> list[int]:
        """How many pages `take` can return for each rank."""
        return [part.available for part in self.parts]

    @property
    def pinned_evictions(self) -> int:
        """Of all ranks together: pages that were evicted though they were pinned."""
        return sum(part.pinned_evictions for part in self.parts)

    @property
    def fullest(self) -> Arena:
        """The arena in which most pages are used."""
        return max(self.parts, key=lambda part: part.used)

    def take(self, rank: int) -> int:
        """See Arena.take."""
        return self.parts[rank].take() * self.kvp + rank

    def name(self, page: int, key: Key) -> None:
        """See Arena.name."""
        self._part(page).name(page // self.kvp, key)

    def unname(self, page: int) -> None:
        """See Arena.unname."""
        self._part(page).unname(page // self.kvp)

    def share(self, page: int) -> int:
        """See Arena.share."""
        self._part(page).share(page // self.kvp)
        return page

    def unshare(self, page: int) -> None:
        """See Arena.unshare."""
        self._part(page).unshare(page // self.kvp)

    def release(self, page: int, worth: float = 0.0) -> None:
        """See Arena.release."""
        self._part(page).release(page // self.kvp, worth)

    def pin(self, key: Key, page: int | None) -> None:
        """Evict the page of this key last. page: that has the key now, if any"""
        self.pinned[key] += 1
        self._rerank(page)

    def unpin(self, key: Key, page: int | None) -> None:
        """Undo `pin`."""
        self.pinned[key] -= 1
        if not self.pinned[key]:
            del self.pinned[key]
        self._rerank(page)

    def was_shared(self, page: int) -> bool:
        """See Arena.was_shared."""
        return self._part(page).was_shared(page // self.kvp)

    @property
    def named(self) -> dict[Key, int]:
        """The named pages, by key."""
        return {
            key: page * self.kvp + rank
            for rank, part in enumerate(self.parts)
            for key, page in part.named.items()
        }

    def check(self) -> None:
        """Audit every rank's arena, and that no contents have two names."""
        for part in self.parts:
            part.check()
        names = sum(len(part.named) for part in self.parts)
        assert len(self.named) == names, "pages of two ranks have the same key"

    def _rerank(self, page: int | None) -> None:
        if page is not None:
            self._part(page).rerank(page // self.kvp)

    def _part(self, page: int) -> Arena:
        return self.parts[page % self.kvp]
