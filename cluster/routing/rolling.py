"""Quantiles of the latest observations."""

from __future__ import annotations

from collections import deque

from sortedcontainers import SortedList


class RollingQuantile:
    """The last `size` values, in order of size and of age."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._by_age: deque[float] = deque()
        self._by_value: SortedList[float] = SortedList()

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, value: float) -> None:
        self._by_age.append(value)
        self._by_value.add(value)
        if len(self._by_age) > self._size:
            self._by_value.remove(self._by_age.popleft())

    def quantile(self, share: float) -> float:
        """The smallest value that at least `share` of the window does not exceed.

        Raises IndexError if there is none yet.
        """
        count = len(self._by_value)
        return self._by_value[min(count - 1, int(share * count))]
