"""Which blocks of pages an engine's prefix cache holds, for routers to place requests by."""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.workers.lease import PageChanges


class CachedBlocks:
    """All held blocks, and the changes that were not reported yet; by the digests of the blocks'
    last pages."""

    def __init__(self) -> None:
        self._held: dict[bytes, None] = {}
        self._changed: dict[bytes, bool] = {}  # and whether they are held now

    def note(self, changes: Mapping[bytes, bool]) -> None:
        """changes: block -> whether the cache now holds it"""
        for block, held in changes.items():
            self._changed.pop(block, None)
            self._changed[block] = held
            if held:
                self._held[block] = None
            else:
                self._held.pop(block, None)

    def take_changes(self) -> PageChanges:
        """The changes since the last call, oldest first."""
        changes, self._changed = self._changed, {}
        return PageChanges(
            tuple(block for block, held in changes.items() if held),
            tuple(block for block, held in changes.items() if not held),
        )

    def restate(self) -> PageChanges:
        """Everything that is held, for a new router."""
        self._changed = {}
        return PageChanges(held=tuple(self._held))
