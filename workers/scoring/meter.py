"""The progress of an evaluation, in computed tokens."""

from __future__ import annotations

from collections.abc import Callable


class Meter:
    """report: called with (done, total) whenever either changes"""

    def __init__(self, report: Callable[[int, int], None] | None = None) -> None:
        self._report = report
        self._done = 0
        self._total = 0

    def plan(self, tokens: int) -> None:
        """Add tokens that will be computed."""
        self._total += tokens
        self._notify()

    def advance(self, tokens: int) -> None:
        """Add tokens that have been computed."""
        self._done += tokens
        self._notify()

    def _notify(self) -> None:
        if self._report is not None:
            self._report(self._done, self._total)
