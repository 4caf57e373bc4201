"""How a sequence's pages are dealt to the kvp ranks that share its keys and values.

Page p belongs to rank (p + offset) mod kvp. With kvp = 3 and offset 1:

    page     0  1  2  3  4  5  6
    rank     1  2  0  1  2  0  1

A rank's pages are first, first + kvp, first + 2 kvp, …; in its tables page p has column p // kvp.

One number names a page and its rank: kvp · page + rank, where `page` is its place in the arena of
that rank. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageDeal:
    kvp: int = 1
    offset: int = 0

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
