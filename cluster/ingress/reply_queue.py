"""The events of a stream that its reader has not taken yet.

With nothing else to send, a stream repeats its status, so that neither people nor proxies give
it up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from kvmesh.cluster.ingress.stream_status import StreamStatus
from kvmesh.cluster.ingress.waker import Waker
from kvmesh.v1 import kvmesh_pb2 as pb

SILENCE_S = 4.0  # the contract's 5 s, less what the way may take


class ReplyQueue:
    """Read by one task, which is woken when its turn comes.

    status: what to send when there is nothing else
    silence_s: from the last event until the status is sent again
    """

    def __init__(self, waker: Waker, status: StreamStatus, silence_s: float = SILENCE_S) -> None:
        self.status = status
        self._waker = waker
        self._silence_s = silence_s
        self._events: list[pb.GenerateStreamResponse] = []
        self._status_due = False
        self._ready = asyncio.Event()
        self._woken = False  # or about to be
        self._sent_s = 0.0  # the event loop's time
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """The reader is there; from now on it is never left in silence."""
        self._sent_s = asyncio.get_running_loop().time()
        self._break_silence()

    def close(self) -> None:
        """The reader has left. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # it refers to this queue

    def put(self, events: Iterable[pb.GenerateStreamResponse]) -> None:
        """Add events, for which the reader is not woken."""
        self._events += events

    def send_status(self) -> None:
        """Send the status, unless there is output to send by then."""
        self._status_due = True
        self.wake()

    def wake(self) -> None:
        """Wake the reader, when its turn comes."""
        if not self._woken:
            self._woken = True
            self._waker.wake(self._ready)

    async def wait(self) -> None:
        """Until the reader is woken, and it is its turn."""
        if self._ready.is_set():
            # Its turn came while it was still sending, as were others that continue now.
            await self._waker.turn()
        await self._ready.wait()
        self._ready.clear()
        self._woken = False

    def take(self, *, over: bool) -> list[pb.GenerateStreamResponse]:
        """All events so far. over: the stream has nothing to wait for any more"""
        events, self._events = self._events, []
        if self._status_due:
            self._status_due = False
            if not events and not over:
                events.append(self.status.event())
        if events:
            self._sent_s = asyncio.get_running_loop().time()
        return events

    def _break_silence(self) -> None:
        """Send the status if nothing was sent for long. One timer, whatever is sent meanwhile."""
        loop = asyncio.get_running_loop()
        due = self._sent_s + self._silence_s
        if due <= loop.time():
            self.send_status()
            due = loop.time() + self._silence_s
        self._timer = loop.call_at(due, self._break_silence)
