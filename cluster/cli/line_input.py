"""What a user types in a chat: edited, remembered, and pasted in one piece."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from kvmesh.cluster.state_directory import state_directory


class PrivateHistory(FileHistory):
    """In a file that only the user can read. A full disk loses lines, but not the chat."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def message_reader() -> Callable[[], str]:
    """Reads the next message, and raises EOFError after the last one.

    On a terminal: Enter sends, Alt-Enter begins a line, a pasted text stays whole. Elsewhere
    each line of stdin is a message.
    """
    if not sys.stdin.isatty():
        return lambda: _next_line(sys.stdin)
    session: PromptSession[str] = PromptSession(history=_history(), key_bindings=_keys())
    return lambda: session.prompt(HTML("<b><ansicyan>you ›</ansicyan></b> ")).strip()


def _next_line(lines: Iterable[str]) -> str:
    for line in lines:
        if line.strip():
            return line.strip()
    raise EOFError


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    path = state_directory() / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()  # a home that cannot be written to
    return PrivateHistory(path)
