"""What processes run that make the same entry of a store; imports little, as each imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvmesh.workers.model.store import ModelStore


def fill(path: Path) -> None:
    (path / "weights").write_bytes(bytes(1000))


def make_entry(root: Path, turns: Any) -> None:
    """turns: a queue, which gets a word from each process that fills the entry"""

    def fill_once(path: Path) -> None:
        turns.put("filled")
        fill(path)

    ModelStore(root).make("key", "name", fill_once, 0)
