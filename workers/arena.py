"""Page ids of one arena: free, used (with a reference count), or cached.

A page with a `key` that is no longer used stays cached; cached pages are evicted in the
order in which they were released. A page without a key goes back to the free list at once.
At all times free + cached + used = total.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

Key = bytes


class Arena:
    """Allocates pages 0 … total − 1; calls `on_evict` with the key of an evicted page."""

    def __init__(self, total: int, on_evict: Callable[[Key], None] = lambda key: None) -> None:
        self.total = total
        self._on_evict = on_evict
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._keys: dict[int, Key] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

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
            page, _ = self._cached.popitem(last=False)
            self._on_evict(self._keys.pop(page))
        else:
            raise IndexError("no page available")
        self._holders[page] = 1
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
        return page

    def release(self, page: int) -> None:
        """Remove a holder."""
        assert self._holders[page] > 0, f"page {page} released more often than taken"
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._keys:
            self._cached[page] = None
        else:
            self._free.append(page)

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
