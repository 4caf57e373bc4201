"""Finds stop strings in text that arrives in pieces.

emitted so far | held back: could be the start of a stop string
                            ^ always shorter than the longest stop string

Some of the text may be hidden: special tokens that the output does not show. A stop string is
found in what is shown, and in the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class StopStrings:
    """Passes text through up to the first stop string.

    The text emitted so far depends only on the text received, not on how that was
    split into pieces, so that a resumed stream can be replayed.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError(f"stops must not contain an empty string, got {tuple(stops)!r}")
        self._stops = tuple(stops)
        self._held = ""
        self._shown: list[bool] = []  # for each character held back
        self._longest = max((len(stop) for stop in self._stops), default=0)

    def push(self, text: str, hidden: str = "", *, may_end: bool = True) -> tuple[str, str | None]:
        """(text to show that is final now, the stop string found or None).

        hidden: follows `text`, and is not shown
        may_end: otherwise a stop string that becomes complete is ordinary text

        If several stop strings match, the one that completes first ends the text; of
        those that complete at the same character, the one that starts first.
        """
        if not self._stops:
            return text, None
        received = len(self._held)
        buffer = self._held + text + hidden
        shown = self._shown + [True] * len(text) + [False] * len(hidden)
        matched = None
        keep = self._possible_start(buffer, shown)
        if may_end:
            # Matches are ordered by where they complete, so that the result does
            # not depend on how much text arrived at once.
            found = min(self._complete(buffer, shown, received), default=None)
            if found is not None:
                _, keep, matched = found
        final = _visible(buffer[:keep], shown)
        self._held, self._shown = ("", []) if matched else (buffer[keep:], shown[keep:])
        return final, matched

    def flush(self) -> str:
        """The text held back; for the end, when no more follows."""
        held = _visible(self._held, self._shown)
        self._held, self._shown = "", []
        return held

    def _complete(
        self, buffer: str, shown: list[bool], received: int
    ) -> Iterator[tuple[int, int, str]]:
        """(end, start, stop) of the matches that end after the first `received` characters."""
        for text, at in _views(buffer, shown):
            before = sum(position < received for position in at)
            for stop in self._stops:
                start = text.find(stop, max(0, before - len(stop) + 1))
                if start >= 0:
                    yield at[start + len(stop) - 1], at[start], stop

    def _possible_start(self, buffer: str, shown: list[bool]) -> int:
        """Where the longest suffix starts that is a proper prefix of a stop string."""
        found = len(buffer)
        for text, at in _views(buffer, shown):
            for start in range(max(0, len(text) - self._longest + 1), len(text)):
                if any(stop.startswith(text[start:]) for stop in self._stops):
                    found = min(found, at[start])
                    break
        return found


def _visible(text: str, shown: list[bool]) -> str:
    """What is shown of a text. shown: for each of its characters, and perhaps for more"""
    if all(shown):
        return text
    return "".join(c for c, is_shown in zip(text, shown, strict=False) if is_shown)


def _views(buffer: str, shown: list[bool]) -> Iterator[tuple[str, Sequence[int]]]:
    """The whole text and what is shown of it, with the positions of their characters."""
    yield buffer, range(len(buffer))
    if not all(shown):
        at = [position for position, is_shown in enumerate(shown) if is_shown]
        yield "".join(buffer[position] for position in at), at
