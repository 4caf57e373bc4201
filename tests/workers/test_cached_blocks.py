"""What is reported of the blocks that a prefix cache holds."""

from __future__ import annotations

from kvmesh.workers.cached_blocks import CachedBlocks
from kvmesh.workers.lease import PageChanges


def test_changes_are_reported_once_with_their_latest_state() -> None:
    blocks = CachedBlocks()
    blocks.note({b"a": True, b"b": True, b"c": False})
    blocks.note({b"a": False, b"d": True})
    assert blocks.take_changes() == PageChanges(held=(b"b", b"d"), dropped=(b"c", b"a"))
    assert blocks.take_changes() == PageChanges()


def test_a_new_router_gets_what_is_held_and_no_change_twice() -> None:
    blocks = CachedBlocks()
    blocks.note({b"a": True, b"b": True})
    blocks.note({b"a": False})
    assert blocks.restate() == PageChanges(held=(b"b",))
    assert blocks.take_changes() == PageChanges()
    blocks.note({b"c": True})
    assert blocks.take_changes() == PageChanges(held=(b"c",))
    assert blocks.restate() == PageChanges(held=(b"b", b"c"))
