"""The directory for files that stay: what was typed in chats, and the program that runs HAProxy."""

from __future__ import annotations

import os
from pathlib import Path


def state_directory() -> Path:
    """$XDG_STATE_HOME/kvmesh, by default ~/.local/state/kvmesh."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local/state") / "kvmesh"
