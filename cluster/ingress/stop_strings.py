"""Finds stop strings in text that arrives in pieces.

emitted so far | held back: could be the beginning of a stop string
                            ^ never more than the longest one, less a character
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through up to the first stop string.

    What it has passed after a given text is the same however that was cut into
    pieces, so that a resumed stream can be replayed.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("stops must not contain an empty string")
        self._stops = tuple(stops)
        self._held = ""
        self._longest = max((len(stop) for stop in self._stops), default=0)

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain now, the stop string found or None).

        Of several stop strings the one that is complete first ends the text; of
        those complete at the same character, the one that begins first.
        """
        if not self._stops:
            return text, None
        buffer = self._held + text
        # Matches are looked for from where they complete, so that the answer
        # does not depend on how much text came at once.
        found = self._first_complete(buffer)
        if found is not None:
            begin, stop = found
            self._held = ""
            return buffer[:begin], stop
        keep = self._possible_beginning(buffer)
        self._held = buffer[keep:]
        return buffer[:keep], None

    def flush(self) -> str:
        """The text held back, when no more follows."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, buffer: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            begin = buffer.find(stop)
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best[:2]):
                best = (begin + len(stop), begin, stop)
        return None if best is None else (best[1], best[2])

    def _possible_beginning(self, buffer: str) -> int:
        """Where the longest suffix begins that is a proper prefix of a stop string."""
        for begin in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            if any(stop.startswith(buffer[begin:]) for stop in self._stops):
                return begin
        return len(buffer)
