"""How a sequence's pages are dealt to the kvp ranks that share its keys and values.

Page p belongs to rank (p + offset) mod kvp. With kvp = 3 and offset 1:

    page     0  1  2  3  4  5  6
    rank     1  2  0  1  2  0  1

A rank's pages are first, first + kvp, first + 2 kvp, …; in its tables page p has column p // kvp.

The offset follows from a sequence's first DEAL_TOKENS tokens: prompts with a page in common have
them in common as well, so that equal contents belong to equal ranks. A sequence that begins with
fewer does not know yet what it will have in common with others, and shares no pages.

One number names a page and its rank: kvp · page + rank, where `page` is its place in the arena of
that rank. Torch-free.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

# At most the tokens of the smallest page.
DEAL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class PageDeal:
    kvp: int = 1
    offset: int = 0

    @classmethod
    def of(cls, kvp: int, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> PageDeal:
        """The deal of a sequence that begins with these tokens ([n] int32)."""
        if kvp == 1:
            return cls()
        return cls(kvp, zlib.crc32(np.ascontiguousarray(tokens[:DEAL_TOKENS]).tobytes()) % kvp)

    def rank_of(self, page: int) -> int:
        """The rank to which a logical page belongs."""
        return (page + self.offset) % self.kvp

    def first_from(self, page: int, rank: int) -> int:
        """The first logical page of `rank` that is not before `page`."""
        return page + (rank - self.rank_of(page)) % self.kvp

    def counts(self, pages: range) -> list[int]:
        """How many of these consecutive logical pages each rank has."""
        share, rest = divmod(len(pages), self.kvp)
        counts = [share] * self.kvp
        for page in pages[:rest]:
            counts[self.rank_of(page)] += 1
        return counts


def fits(counts: list[int], room: list[int]) -> bool:
    """Whether no rank needs more pages than it has."""
    return all(count <= free for count, free in zip(counts, room, strict=True))
