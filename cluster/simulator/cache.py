"""A simulated pool of sealed pages: used by sequences, cached, or free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class SimPool:
    """used + cached + free = total, in pages.

    Prompt blocks of `block_pages` pages are shared by the sequences that hold them,
    and stay cached afterwards until their pages are needed, least recently used first.
    """

    def __init__(self, total_pages: int, block_pages: int) -> None:
        self.total_pages = total_pages
        self.block_pages = block_pages
        self.used_pages = 0
        self.evicted: list[int] = []
        self._holders: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def cached_pages(self) -> int:
        return len(self._cached) * self.block_pages

    @property
    def available_pages(self) -> int:
        """Pages that are free or can be evicted."""
        return self.total_pages - self.used_pages

    def match(self, blocks: Sequence[int]) -> int:
        """The number of leading blocks that are in the pool."""
        for count, block in enumerate(blocks):
            if block not in self._holders and block not in self._cached:
                return count
        return len(blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Share blocks that are in the pool."""
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
                self.used_pages += self.block_pages
            self._holders[block] = self._holders.get(block, 0) + 1

    def name(self, blocks: Sequence[int]) -> None:
        """Turn a sequence's own pages into shareable blocks; duplicates are freed."""
        for block in blocks:
            holders = self._holders.get(block, 0)
            if holders or block in self._cached:
                self.used_pages -= self.block_pages
                self.hold([block])
            else:
                self._holders[block] = 1

    def drop(self, blocks: Sequence[int]) -> None:
        """Release blocks, the last ones first, so that a prefix is evicted from its end."""
        for block in reversed(blocks):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
            else:
                del self._holders[block]
                self._cached[block] = None
                self.used_pages -= self.block_pages

    def take(self, pages: int) -> bool:
        """Take pages for a sequence, evicting cached ones if needed; False if there are too few."""
        if pages > self.available_pages:
            return False
        self.used_pages += pages
        while self.used_pages + self.cached_pages > self.total_pages:
            block, _ = self._cached.popitem(last=False)
            self.evicted.append(block)
        return True

    def give(self, pages: int) -> None:
        self.used_pages -= pages
