"""Why a run ends before its last line."""

from __future__ import annotations


class BatchRunError(Exception):
    """The run cannot start or continue. Lines that are not answered stay so, for another run.

    unreachable: because no server answers
    """

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable
