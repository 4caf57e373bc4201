"""When a stream that has sent nothing for long repeats its status, on the test's own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kvmesh.cluster.ingress.reply_queue import ReplyQueue
from kvmesh.cluster.ingress.stream_status import StreamStatus
from kvmesh.v1 import kvmesh_pb2 as pb


@dataclass
class Timer:
    due_s: float
    call: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """In place of the event loop: its time, and its timers, of which one runs at a time."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timer: Timer | None = None

    def time(self) -> float:
        return self.now_s

    def call_at(self, due_s: float, call: Callable[[], None]) -> Timer:
        self.timer = Timer(due_s, call)
        return self.timer

    def until(self, now_s: float) -> None:
        while self.timer is not None and not self.timer.cancelled and self.timer.due_s <= now_s:
            self.now_s, timer = self.timer.due_s, self.timer
            timer.call()
            assert self.timer is not timer, "it continues"
        self.now_s = now_s


class Woken:
    """In place of the waker: how often the reader was woken."""

    def __init__(self) -> None:
        self.times = 0

    def wake(self, ready: asyncio.Event) -> None:
        self.times += 1
        ready.set()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    made = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: made)
    return made


def test_the_status_comes_after_silence_and_not_between_outputs(loop: Loop) -> None:
    woken: Any = Woken()
    queue = ReplyQueue(woken, StreamStatus("r", loop.time), silence_s=4.0)
    queue.open()
    for now_s in (103.0, 106.0, 109.0):
        loop.until(now_s)
        queue.put([pb.GenerateStreamResponse(delta=pb.Delta())])
        assert [x.WhichOneof("event") for x in queue.take(over=False)] == ["delta"]
    loop.until(112.9)
    assert woken.times == 0
    loop.until(113.0)
    assert woken.times == 1
    assert [x.WhichOneof("event") for x in queue.take(over=False)] == ["queued"]
    loop.until(116.9)
    assert queue.take(over=False) == []
    loop.until(117.0)
    assert queue.take(over=True) == [], "the stream has nothing to wait for any more"
    queue.close()
    queue.close()
    assert loop.timer is not None and loop.timer.cancelled
