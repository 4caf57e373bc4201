"""What is said of a group when a request is placed."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageNeed

MIB = 1 << 20


class Reason(enum.Enum):
    """Why a group was, or was not, chosen. No waiting cures the first four."""

    CONTEXT = "prompt and output exceed its context"
    SEQUENCES = "it never runs that many sequences at once"
    PAGES = "the request needs more pages than it has"
    FORMAT = "the request does not accept its KV format"
    DOWN = "it is down"
    DRAINING = "it finishes what it has and takes nothing new"
    QUOTA = "the request would pass its tenant's quota there"
    BUSY = "its sequences are all taken"
    FULL = "its free pages do not hold the request now"
    BACKLOG = "prompts it was given before are still being computed"
    LONG = "its prompt would take a group that other requests need"
    PROMISED = "its pages are promised to a request that waits longer"
    WORSE = "another group is a better place"
    CHOSEN = "chosen"


NEVER = frozenset({Reason.CONTEXT, Reason.SEQUENCES, Reason.PAGES, Reason.FORMAT})


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

    def __str__(self) -> str:
        free, capacity = self.available_bytes / MIB, self.capacity_bytes / MIB
        parts = [
            f"needs {self.needed_bytes / MIB:,.1f} MiB",
            f"{free:,.1f} of {capacity:,.1f} MiB are free",
        ]
        if self.cached_pages:
            parts.append(f"holds {self.cached_pages} pages of its prompt")
        if self.cost_s is not None:
            parts.append(f"cost {self.cost_s:.3f} s")
        return f"{self.group}: {self.reason.value} ({'; '.join(parts)})"


# group, its engine, reason, pages needed there, free pages, cached pages, cost
Row = tuple[str, EngineInfo, Reason, PageNeed, PageNeed, int, float | None]


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts of all groups, worded only when they are read: deciding is a hot path."""

    rows: tuple[Row, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Verdict]:
        return map(_worded, self.rows)

    @property
    def never(self) -> bool:
        """Whether no group could take the request however long it waited."""
        return all(row[2] in NEVER for row in self.rows)


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
