"""Which groups hold which blocks of pages, by the blocks' chained hashes.

A hint for placement, never part of the budget: it may be stale either way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence


class PrefixIndex:
    """Page hash -> the groups that hold it, as a bit mask; at most `limit` hashes.

    Hashes chain, so a group that holds a page is assumed to hold those before it, and
    a match takes O(groups · log pages) look-ups, however long the prompt is.
    """

    def __init__(self, limit: int = 1_000_000) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.limit = limit
        self._masks: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._bits: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._masks)

    def add(self, group: str, hashes: Iterable[bytes]) -> None:
        """The group holds these pages; they become the youngest of the index."""
        bit = self._bits.setdefault(group, 1 << len(self._bits))
        masks = self._masks
        for page_hash in hashes:
            masks[page_hash] = masks.get(page_hash, 0) | bit
            masks.move_to_end(page_hash)
        while len(masks) > self.limit:
            masks.popitem(last=False)

    def remove(self, group: str, hashes: Iterable[bytes]) -> None:
        """The group has evicted these pages."""
        bit = self._bits.get(group, 0)
        for page_hash in hashes:
            mask = self._masks.get(page_hash, 0) & ~bit
            if mask:
                self._masks[page_hash] = mask
            else:
                self._masks.pop(page_hash, None)

    def clear(self, group: str) -> None:
        """The group holds nothing now: O(index), for a group that went down."""
        bit = self._bits.get(group, 0)
        kept = ((key, mask & ~bit) for key, mask in self._masks.items())
        self._masks = OrderedDict((key, mask) for key, mask in kept if mask)

    def match(self, hashes: Sequence[bytes]) -> Mapping[str, int]:
        """How many leading pages each group holds; groups without any are left out."""
        if not hashes or not (first := self._masks.get(hashes[0], 0)):
            return {}
        depth: dict[int, int] = {}
        self._descend(hashes, 0, first, len(hashes), 0, depth)
        return {group: depth[bit] for group, bit in self._bits.items() if bit in depth}

    def _descend(
        self,
        hashes: Sequence[bytes],
        low: int,
        low_mask: int,
        high: int,
        high_mask: int,
        depth: dict[int, int],
    ) -> None:
        """Record, for groups in `low_mask` and not in `high_mask`, where between they end.

        Pages [0, low] are held by low_mask; page `high` (past the end: held by none) by high_mask.
        """
        leaving = low_mask & ~high_mask
        if not leaving:
            return
        if high - low == 1:
            while leaving:
                bit = leaving & -leaving
                depth[bit] = low + 1
                leaving ^= bit
            return
        middle = (low + high) // 2
        mask = self._masks.get(hashes[middle], 0) & low_mask
        self._descend(hashes, low, low_mask, middle, mask, depth)
        self._descend(hashes, middle, mask, high, high_mask & mask, depth)
