"""Finds decoding sequences that read the same first sealed pages, from the block tables.

Sequences with a common prefix hold the same pages, through prefix caching or as choices of
one request. If they are read together, such pages are unpacked once for all. Prefixes nest: of
a system prompt that all sequences share and a document that some share, a set uses the one
that saves more reads,

    saved = (members - 1) * common pages
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# An additional set costs a kernel per layer, and parts to merge.
MIN_SAVED_PAGES = 8


@dataclass(frozen=True, eq=False, slots=True)
class PrefixSets:
    """`SharedPrefixes` of the kernels on the host: pages [S] of S sequences, members, starts."""

    pages: Ints
    members: Ints
    starts: Ints

    def padded(self, size: int) -> PrefixSets:
        """Padded to `size` sequences, with as many sets as they could form."""
        return PrefixSets(
            _pad(self.pages, size, 0),
            _pad(self.members, size, 0),
            _pad(self.starts, num_starts(size), int(self.starts[-1])),
        )


def num_starts(size: int) -> int:
    """Every set has at least two members."""
    return size // 2 + 1


class PrefixFinder:
    """Finds sets in a host copy of the sealed tables, and caches the last answer.

    sealed_ids: [rows, pages], updated by the caller, who then calls `note_update`
    min_members, max_members: of a set
    """

    def __init__(self, sealed_ids: Ints, min_members: int, max_members: int) -> None:
        self._ids = sealed_ids
        self._min_members = min_members
        self._max_members = max_members
        self._asked: tuple[bytes, ...] | None = None
        self._found: PrefixSets | None = None

    def note_update(self) -> None:
        self._asked = None

    def find(self, rows: Ints, starts: Ints, stops: Ints) -> PrefixSets | None:
        """The sets of a step's sequences, or None if they share nothing.

        rows: [S] of the tables
        starts: [S], where sealed pages begin, after the sink; equal for sequences that share pages
        stops: [S], the first page that a sequence does not read sealed; 0 for a sequence
            with several new tokens, which does not share
        """
        asked = tuple(x.tobytes() for x in (rows, starts, stops))
        if asked != self._asked:
            self._asked, self._found = asked, self._search(rows, starts, stops)
        return self._found

    def _search(self, rows: Ints, starts: Ints, stops: Ints) -> PrefixSets | None:
        counts = stops - starts
        self._starts = starts
        sharing = np.flatnonzero(counts > 0)
        found: list[tuple[list[int], int]] = []
        for members in self._with_same_page(rows, sharing, 0):
            found += self._divide(rows, counts, members, 1)[1]
        pages = np.zeros(len(rows), np.int64)
        sets: list[Ints] = []
        for chosen, common in found:
            if (len(chosen) - 1) * common < MIN_SAVED_PAGES:
                continue
            for start in range(0, len(chosen), self._max_members):
                part = np.array(chosen[start : start + self._max_members])
                if len(part) >= self._min_members:
                    pages[part] = common
                    sets.append(part)
        if not sets:
            return None
        starts = np.cumsum([0, *map(len, sets)])
        return PrefixSets(pages, np.concatenate(sets), starts)

    def _with_same_page(self, rows: Ints, members: Ints, place: int) -> list[Ints]:
        """Members with the same page `place` pages after the sink, in groups that can be sets."""
        ids = self._ids[rows[members], self._starts[members] + place]
        order = np.argsort(ids, kind="stable")
        cuts = np.flatnonzero(np.diff(ids[order])) + 1
        return [part for part in np.split(members[order], cuts) if len(part) >= self._min_members]

    def _divide(
        self, rows: Ints, counts: Ints, members: Ints, known: int
    ) -> tuple[int, list[tuple[list[int], int]]]:
        """The sets among members that share at least `known` pages, and the reads they save."""
        start = int(self._starts[members[0]])
        table = self._ids[rows[members], start : start + int(counts[members].min())]
        differ = np.flatnonzero((table[:, known:] != table[0, known:]).any(0))
        common = known + int(differ[0]) if len(differ) else table.shape[1]
        saved, sets = 0, []
        rest = set(members.tolist())
        # Members with longer common prefixes form their own set if that saves more reads.
        longer = members[counts[members] > common]
        for part in self._with_same_page(rows, longer, common):
            more, within = self._divide(rows, counts, part, common + 1)
            if more > len(part) * common:
                saved += more
                sets += within
                rest -= set(part.tolist())
        if len(rest) >= self._min_members:
            saved += (len(rest) - 1) * common
            sets.append((sorted(rest), common))
        return saved, sets


def _pad(array: Ints, size: int, value: int) -> Ints:
    return np.append(array, np.full(size - len(array), value, np.int64))
