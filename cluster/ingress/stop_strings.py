"""Finds stop strings in text that arrives in pieces.

emitted so far | held back: could be the start of a stop string
                            ^ always shorter than the longest stop string
"""

from __future__ import annotations

from collections.abc import Sequence


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
        self._longest = max((len(stop) for stop in self._stops), default=0)

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is final now, the stop string found or None).

        If several stop strings match, the one that completes first ends the text; of
        those that complete at the same character, the one that starts first.
        """
        if not self._stops:
            return text, None
        buffer = self._held + text
        # Matches are ordered by where they complete, so that the result does
        # not depend on how much text arrived at once.
        found = self._first_complete(buffer)
        if found is not None:
            start, stop = found
            self._held = ""
            return buffer[:start], stop
        keep = self._possible_start(buffer)
        self._held = buffer[keep:]
        return buffer[:keep], None

    def flush(self) -> str:
        """The text held back; for the end, when no more follows."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, buffer: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _possible_start(self, buffer: str) -> int:
        """Where the longest suffix starts that is a proper prefix of a stop string."""
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            if any(stop.startswith(buffer[start:]) for stop in self._stops):
                return start
        return len(buffer)
