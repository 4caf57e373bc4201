"""Which sequences have run out of time."""

from __future__ import annotations

from sortedcontainers import SortedList


class Deadlines:
    """Of live sequences, by their request ids. Times are in seconds of one clock."""

    def __init__(self) -> None:
        self._due_s: dict[str, float] = {}
        self._in_order: SortedList[tuple[float, str]] = SortedList()

    def add(self, request_id: str, due_s: float) -> None:
        """The id's deadline, in place of the one that it had."""
        self.remove(request_id)
        self._due_s[request_id] = due_s
        self._in_order.add((due_s, request_id))

    def remove(self, request_id: str) -> None:
        """A sequence has ended, if it had a deadline."""
        if (due_s := self._due_s.pop(request_id, None)) is not None:
            self._in_order.remove((due_s, request_id))

    def left_s(self, now: float) -> float | None:
        """Until the earliest deadline; None without any."""
        return max(self._in_order[0][0] - now, 0.0) if self._in_order else None

    def take_due(self, now: float) -> list[str]:
        """The sequences whose time is up, which are removed."""
        due = []
        while self.left_s(now) == 0.0:
            _, request_id = self._in_order.pop(0)
            del self._due_s[request_id]
            due.append(request_id)
        return due
