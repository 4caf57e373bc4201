"""What is said of a group when a request is placed."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why a group was, or was not, chosen. The first four no waiting cures."""

    QUALITY = "its KV format is below the request's quality floor"
    CONTEXT = "prompt and output exceed its context"
    SEQUENCES = "it never runs that many sequences at once"
    PAGES = "the request needs more pages than it has"
    EXCLUDED = "the request excludes it"
    DOWN = "it is down"
    UNREPORTED = "its engine has not reported yet"
    BUSY = "its sequences are all taken"
    FULL = "its free pages do not hold the request now"
    WORSE = "another group is a better place"
    CHOSEN = "chosen"


NEVER = frozenset({Reason.QUALITY, Reason.CONTEXT, Reason.SEQUENCES, Reason.PAGES})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was said of one group; bytes are over all its ranks."""

    group: str
    reason: Reason
    needed_bytes: int
    available_bytes: int
    capacity_bytes: int

    @property
    def never(self) -> bool:
        return self.reason in NEVER
