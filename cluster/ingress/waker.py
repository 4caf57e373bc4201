"""Fair turns for many streams on one event loop."""

from __future__ import annotations

import asyncio
from collections import deque

STREAMS_PER_TURN = 2  # under 1 ms of work


class Waker:
    """Wakes a bounded number of streams per turn of the event loop, in order.

    An engine's step has output for every stream at once. If all of them were written in the
    same turn, a health check or a new request would wait for hundreds of writes, and for as
    many again at each of its own steps.
    """

    def __init__(self, streams_per_turn: int = STREAMS_PER_TURN) -> None:
        self._streams_per_turn = streams_per_turn
        self._waiting: deque[asyncio.Event] = deque()

    def wake(self, ready: asyncio.Event) -> None:
        """Set `ready` when its turn comes. Call it once until then."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._turn)
        self._waiting.append(ready)

    async def turn(self) -> None:
        """Wait for a turn, as streams do. For work that many may have at the same moment."""
        ready = asyncio.Event()
        self.wake(ready)
        await ready.wait()

    def _turn(self) -> None:
        waiting = self._waiting
        for _ in range(min(self._streams_per_turn, len(waiting))):
            waiting.popleft().set()
        if waiting:
            asyncio.get_running_loop().call_soon(self._turn)
