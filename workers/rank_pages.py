"""Which pages of the running sequences a rank has, and in which columns of its tables (deal.py)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.attention import columns_below
from kvmesh.workers.plan import RowStart, TableUpdate

Ints = npt.NDArray[np.int64]


class RankPages:
    """One of kvp ranks to which pages are dealt. With kvp = 1 it has all of them."""

    def __init__(self, kvp: int, rank: int, max_rows: int) -> None:
        self.kvp = kvp
        self._rank = rank
        # By row: the first logical page that is here.
        self._firsts = np.zeros(max_rows, dtype=np.int64)

    def start_row(self, start: RowStart) -> None:
        self._firsts[start.row] = (self._rank - start.offset) % self.kvp

    def firsts(self, rows: Ints) -> Ints:
        """The first logical page of each row that is here."""
        return self._firsts[rows]

    def below(self, pages: Ints | int, rows: Ints) -> Ints:
        """How many pages of each row below these logical pages are here."""
        below: Ints = columns_below(pages, self._firsts[rows], self.kvp)
        return below

    def own(self, ids: list[int]) -> npt.NDArray[np.bool_]:
        """Which of a plan's page ids are pages of this rank."""
        ranks: Ints = np.asarray(ids, dtype=np.int64) % self.kvp
        return np.equal(ranks, self._rank)

    def entries(self, update: TableUpdate) -> tuple[Ints, Ints, Ints]:
        """Rows, columns and ids of the entries of this rank's tables that change."""
        own = self.own(update.ids)
        rows, pages, ids = (
            np.asarray(x, dtype=np.int64)[own] for x in (update.rows, update.pages, update.ids)
        )
        return rows, pages // self.kvp, ids // self.kvp

    def page_ids(self, table: Ints, rows: Ints, pages: Ints) -> Ints:
        """The ids of logical pages in a table of this rank; -1 for pages of other ranks.

        table: [max_rows, columns]; rows, pages: [n]
        """
        if self.kvp == 1:
            return table[rows, pages]
        here = pages % self.kvp == self._firsts[rows]
        return np.where(here, table[rows, pages // self.kvp], -1)
