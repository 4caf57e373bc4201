"""Which sequences have run out of time."""

from __future__ import annotations

import heapq


class Deadlines:
    """Of live sequences, by their request ids. Times are in seconds of one clock."""

    def __init__(self) -> None:
        self._due_s: dict[str, float] = {}
        self._in_order: list[tuple[float, str]] = []  # a heap; removed ones stay until due

    def add(self, request_id: str, due_s: float) -> None:
        self._due_s[request_id] = due_s
        heapq.heappush(self._in_order, (due_s, request_id))

    def remove(self, request_id: str) -> None:
        """A sequence has ended, if it had a deadline."""
        self._due_s.pop(request_id, None)

    def left_s(self, now: float) -> float | None:
        """Until the earliest deadline; None without any."""
        self._drop_removed()
        return max(self._in_order[0][0] - now, 0.0) if self._in_order else None

    def take_due(self, now: float) -> list[str]:
        """The sequences whose time is up, which are removed."""
        due = []
        while self.left_s(now) == 0.0:
            _, request_id = heapq.heappop(self._in_order)
            self.remove(request_id)
            due.append(request_id)
        return due

    def _drop_removed(self) -> None:
        heap = self._in_order
        # An id may have been removed and added again since.
        while heap and self._due_s.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
