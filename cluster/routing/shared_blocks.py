"""Runs of prompts' pages that several leases of a group hold, and pay for once."""

from __future__ import annotations

from collections.abc import Sequence


class SharedBlocks:
    """How many leases hold each block, by its hash.

    Hashes are chained: a lease that holds a block holds those before it. So the blocks that a
    prompt shares with others are at its front.

    Pages are counted as on the rank that has fewest of them, because they are taken off the
    needs of leases, which are those of the fullest rank.

    block_pages: of a block
    sink_pages: the first pages of a prompt, which have no sealed form
    kvp: to how many ranks consecutive pages are dealt
    """

    def __init__(self, block_pages: int, sink_pages: int, kvp: int) -> None:
        self._block_pages = block_pages
        self._sink_pages = sink_pages
        self._kvp = kvp
        self._holders: dict[bytes, int] = {}

    def shared_pages(self, blocks: Sequence[bytes]) -> int:
        """How many of the blocks' sealed pages leases pay for already."""
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in self._holders:
                low = middle + 1
            else:
                high = middle
        first = self._sink_pages // self._block_pages  # the first block with sealed pages
        if low <= first:
            return 0
        return self.sealed_pages(first) + (low - first - 1) * (self._block_pages // self._kvp)

    def hold(self, blocks: Sequence[bytes]) -> int:
        """A new lease holds these; how many of their sealed pages others pay for."""
        shared = 0
        for index, block in enumerate(blocks):
            holders = self._holders.get(block, 0)
            if holders:
                shared += self.sealed_pages(index)
            self._holders[block] = holders + 1
        return shared

    def drop(self, blocks: Sequence[bytes]) -> int:
        """A lease that held these has ended; how many of their sealed pages others pay for."""
        shared = 0
        for index, block in enumerate(blocks):
            holders = self._holders.pop(block)
            if holders > 1:
                shared += self.sealed_pages(index)
                self._holders[block] = holders - 1
        return shared

    def sealed_pages(self, index: int) -> int:
        """Sealed pages of a prompt's block, by its index, that every rank has."""
        end = (index + 1) * self._block_pages
        return min(self._block_pages, max(0, end - self._sink_pages)) // self._kvp
