"""Quantiles of the latest observations."""

from __future__ import annotations

import math
from collections import deque

from sortedcontainers import SortedList


def nearest_rank(share: float, count: int) -> int:
    """Where in `count` values in order the one is that at least `share` of them do not exceed."""
    # A product such as 0.07 * 100 is a little more than it should be.
    return max(math.ceil(share * count - 1e-9), 1) - 1


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
        return self._by_value[nearest_rank(share, len(self._by_value))]
