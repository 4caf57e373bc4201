"""What is said of a group when a request is placed."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageNeed


class Reason(enum.Enum):
    """Why a group was, or was not, chosen. No waiting cures the first three."""

    CONTEXT = "prompt and output exceed its context"
    SEQUENCES = "it never runs that many sequences at once"
    PAGES = "the request needs more pages than it has"
    EXCLUDED = "the request excludes it"
    DOWN = "it is down"
    DRAINING = "it finishes what it has and takes nothing new"
    BUSY = "its sequences are all taken"
    FULL = "its free pages do not hold the request now"
    BACKLOG = "prompts it was given before are still being computed"
    LONG = "its prompt would take a group that other requests need"
    PROMISED = "its pages are promised to a request that waits longer"
    WORSE = "another group is a better place"
    CHOSEN = "chosen"


NEVER = frozenset({Reason.CONTEXT, Reason.SEQUENCES, Reason.PAGES})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was said of one group; bytes are over all its ranks.

    cached_pages: of the prompt, that the group is thought to hold
    cost_s: what placement compares, where the group could take the request
    """

    group: str
    reason: Reason
    needed_bytes: int
    available_bytes: int
    capacity_bytes: int
    cached_pages: int = 0
    cost_s: float | None = None

    @property
    def never(self) -> bool:
        """Whether the group could not take the request even when empty."""
        return self.reason in NEVER


# group, its engine, reason, pages needed there, free pages, cached pages, cost
Row = tuple[str, EngineInfo, Reason, PageNeed, PageNeed, int, float | None]


class Verdicts(Sequence[Verdict]):
    """Verdicts of all groups, worded only when somebody reads them: deciding is hot."""

    __slots__ = ("_rows",)

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Verdict: ...

    @overload
    def __getitem__(self, index: slice) -> Verdicts: ...

    def __getitem__(self, index: int | slice) -> Verdict | Verdicts:
        if isinstance(index, slice):
            return Verdicts(self._rows[index])
        return _worded(self._rows[index])

    def __iter__(self) -> Iterator[Verdict]:
        return map(_worded, self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verdicts) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(self._rows)

    def __reduce__(self) -> tuple[type[Verdicts], tuple[tuple[Row, ...]]]:
        return Verdicts, (self._rows,)

    @property
    def never(self) -> bool:
        """Whether no group could take the request however long it waited."""
        return all(row[2] in NEVER for row in self._rows)


NO_VERDICTS = Verdicts()


def _worded(row: Row) -> Verdict:
    group, info, reason, need, free, cached_pages, cost_s = row
    room = info.capacity if reason in NEVER else PageNeed(max(free.hot, 0), max(free.sealed, 0))
    return Verdict(
        group=group,
        reason=reason,
        needed_bytes=info.geometry.bytes_of(need),
        available_bytes=info.geometry.bytes_of(room),
        capacity_bytes=info.capacity_bytes,
        cached_pages=cached_pages,
        cost_s=cost_s,
    )
