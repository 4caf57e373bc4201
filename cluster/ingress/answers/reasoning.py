"""Splits an answer into what the model thought and what it says."""

from __future__ import annotations

import enum

from kvmesh.workers.constraint import Reasoning


class _State(enum.Enum):
    UNDECIDED = enum.auto()  # whitespace, and perhaps a part of the start marker
    THINKING = enum.auto()
    ANSWERING = enum.auto()


class ReasoningSplit:
    """Text in, (reasoning, answer) out.

    Newlines between the markers and what they enclose, and after the end marker, belong to
    neither. What is emitted in total depends only on the whole text, not on how it came.
    """

    def __init__(self, reasoning: Reasoning) -> None:
        self._start, self._end = reasoning.start, reasoning.end
        self._state = _State.THINKING if reasoning.started else _State.UNDECIDED
        self._held = ""
        self._at_beginning = True  # of the reasoning or of the answer: newlines are dropped

    def push(self, text: str) -> tuple[str, str]:
        self._held += text
        reasoning = ""
        if self._state is _State.UNDECIDED:
            opened = self._held.lstrip()
            if opened.startswith(self._start):
                self._held = opened[len(self._start) :]
                self._state = _State.THINKING
            elif self._start.startswith(opened):
                return "", ""
            else:
                self._state = _State.ANSWERING
                self._at_beginning = False
        if self._state is _State.THINKING:
            thought, found, rest = self._held.partition(self._end)
            if not found:
                keep = _held_back(self._held, self._end)
                thought, self._held = self._held[:keep], self._held[keep:]
            reasoning = self._begin(thought.rstrip("\n") if found else thought)
            if not found:
                return reasoning, ""
            self._held, self._state, self._at_beginning = rest, _State.ANSWERING, True
        answer, self._held = self._begin(self._held), ""
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        """The rest, at the end of the text."""
        held, self._held = self._held, ""
        if self._state is _State.THINKING:
            return self._begin(held), ""
        return "", held

    def _begin(self, text: str) -> str:
        if self._at_beginning:
            text = text.lstrip("\n")
            self._at_beginning = not text
        return text


def _held_back(text: str, marker: str) -> int:
    """Where the newlines begin that may precede the marker, of which the end may be a part."""
    for start in range(max(0, len(text) - len(marker) + 1), len(text)):
        if marker.startswith(text[start:]):
            return len(text[:start].rstrip("\n"))
    return len(text.rstrip("\n"))
