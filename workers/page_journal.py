"""What a prefix cache gained and lost, for readers that ask from time to time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from kvmesh.workers.request import PageChanges

LIMIT = 1 << 14  # blocks; eight million tokens at the usual sizes


class PageJournal:
    """The last change of each of the `limit` digests that changed last.

    A reader names the version it knows and gets what changed since, each digest once; a
    new one, which knows none, gets all there is. Who falls behind by more than the limit
    misses the oldest changes: what is told here is a hint for placement, no account.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self._limit = limit
        self._version = 0
        self._log: OrderedDict[bytes, tuple[int, bool]] = OrderedDict()  # latest change last

    def note(self, changes: Mapping[bytes, bool]) -> None:
        """changes: digest -> whether the cache now holds the page"""
        self._version += 1
        for digest, held in changes.items():
            self._log[digest] = (self._version, held)
            self._log.move_to_end(digest)
        while len(self._log) > self._limit:
            self._log.popitem(last=False)

    def since(self, version: int) -> PageChanges:
        """What changed after `version`, oldest first; O(changes)."""
        held: list[bytes] = []
        dropped: list[bytes] = []
        for digest, (at, is_held) in reversed(self._log.items()):
            if at <= version:
                break
            (held if is_held else dropped).append(digest)
        return PageChanges(self._version, tuple(reversed(held)), tuple(reversed(dropped)))
