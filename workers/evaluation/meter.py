"""How far an evaluation has come, in tokens computed."""

from __future__ import annotations

from collections.abc import Callable


class Meter:
    """report: told (done, total) whenever either changes"""

    def __init__(self, report: Callable[[int, int], None] | None = None) -> None:
        self._report = report
        self._done = 0
        self._total = 0

    def plan(self, tokens: int) -> None:
        """So many tokens more are to be computed."""
        self._total += tokens
        self._tell()

    def advance(self, tokens: int) -> None:
        """So many of them have been."""
        self._done += tokens
        self._tell()

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self._done, self._total)
