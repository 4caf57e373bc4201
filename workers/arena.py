"""Page ids of one arena: free, used (with a reference count), or cached.

A page with a `key` that is no longer used stays cached. A page without a key goes back to the
free list at once. At all times free + cached + used = total.

Cached pages are evicted by what it would cost to have them again, and by age (Cao and Irani,
GreedyDual-Size, 1997; Cherkasova, GDS-Frequency, 1998). A page that is released gets the rank

    age + worth · (1 + how often it was shared)

and the lowest rank is evicted first, of equal ones the one that was released first. `age` is the
rank of the page that was evicted last, so what is not used again is overtaken in time. Worths of 0
give the order of release. A page's worth is the largest that it was released with: so what every
sequence that holds a page also holds is never evicted before that page, if it is released after it.

Pages with a pinned key are evicted after all others, in the same order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container

Key = bytes


class Arena:
    """Allocates pages 0 … total − 1; calls `on_evict` with the key of an evicted page.

    pinned: keys whose pages are evicted last; `rerank` a page whose key enters or leaves them
    pinned_evictions: how many of their pages were evicted all the same
    """

    def __init__(
        self,
        total: int,
        on_evict: Callable[[Key], None] = lambda key: None,
        pinned: Container[Key] = (),
    ) -> None:
        self.total = total
        self.pinned_evictions = 0
        self._on_evict = on_evict
        self._pinned = pinned
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._keys: dict[int, Key] = {}
        self._worths = [0.0] * total
        self._shares = [0] * total
        self._age = 0.0
        self._released = 0
        # (whether it is pinned, rank, number of the release, page) of each cached page; the heap
        # also has outdated ones.
        self._cached: dict[int, tuple[bool, float, int, int]] = {}
        self._heap: list[tuple[bool, float, int, int]] = []

    @property
    def available(self) -> int:
        """Pages that `take` can return: free pages first, then cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - len(self._free) - len(self._cached)

    def take(self) -> int:
        """A page with one holder and no key. Raises IndexError if none is available."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page = self._evict()
        else:
            raise IndexError("no page available")
        self._holders[page] = 1
        self._worths[page] = 0.0
        self._shares[page] = 0
        return page

    def _evict(self) -> int:
        while True:
            entry = heapq.heappop(self._heap)
            pinned, rank, _, page = entry
            if self._cached.get(page) is entry:
                break
        del self._cached[page]
        self.pinned_evictions += pinned
        self._age = max(self._age, rank)  # pinned ones have waited, perhaps at a lower one
        self._on_evict(self._keys.pop(page))
        return page

    def name(self, page: int, key: Key) -> None:
        """Keep `page` cached under `key` when its last holder releases it."""
        assert self._holders[page] > 0 and page not in self._keys
        self._keys[page] = key

    def unname(self, page: int) -> None:
        """Drop the key of a named page; it is free once it has no holder."""
        self._on_evict(self._keys.pop(page))
        if not self._holders[page]:
            del self._cached[page]
            self._free.append(page)

    def share(self, page: int) -> int:
        """Add a holder to a used or cached page."""
        if self._holders[page] == 0:
            del self._cached[page]
        self._holders[page] += 1
        self._shares[page] += 1
        return page

    def release(self, page: int, worth: float = 0.0) -> None:
        """Remove a holder. worth: what it would cost to have the page again, in any unit"""
        assert self._holders[page] > 0, f"page {page} released more often than taken"
        self._holders[page] -= 1
        self._worths[page] = max(self._worths[page], worth)
        if self._holders[page]:
            return
        if page in self._keys:
            self._keep(page)
        else:
            self._free.append(page)

    def was_shared(self, page: int) -> bool:
        """Whether a page has had a further holder since it was taken."""
        return self._shares[page] > 0

    def unshare(self, page: int) -> None:
        """Remove a holder that `share` has added and that did not use the page."""
        self._shares[page] -= 1
        self.release(page)

    def rerank(self, page: int) -> None:
        """The key of a page was pinned, or is no longer."""
        if page in self._cached:
            self._keep(page)

    def _keep(self, page: int) -> None:
        rank = self._age + self._worths[page] * (1 + self._shares[page])
        self._released += 1
        pinned = self._keys[page] in self._pinned
        entry = self._cached[page] = pinned, rank, self._released, page
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * self.total:
            self._heap = list(self._cached.values())
            heapq.heapify(self._heap)

    @property
    def eviction_order(self) -> list[int]:
        """The cached pages, the next to be evicted first."""
        return sorted(self._cached, key=self._cached.__getitem__)

    @property
    def named(self) -> dict[Key, int]:
        """The named pages, by key."""
        return {key: page for page, key in self._keys.items()}

    def check(self) -> None:
        """Audit: every page is in exactly one state, and the counts add up."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, holders in enumerate(self._holders) if holders}
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not (free & cached or free & held or cached & held), "a page is in two states"
        assert len(free) + len(cached) + len(held) == self.total, "a page is lost"
        assert cached <= self._keys.keys() <= cached | held, "a key has no page"
        assert len(self.named) == len(self._keys), "two pages have the same key"
        assert set(self._heap) >= set(self._cached.values()), "a cached page cannot be evicted"
