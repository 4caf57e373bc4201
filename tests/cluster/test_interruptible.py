"""Work in a thread that takes too long: a watchdog that the test sets off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmesh.cluster.ingress.interruptible import InterruptedWorkError, run_interruptible


class Watchdog:
    """In place of a timer: `bark` does what it would do when the time is over."""

    all: list[Watchdog]

    def __init__(self, seconds: float, bark: Callable[[], None]) -> None:
        self.seconds = seconds
        self.bark = bark
        self.state = "made"
        self.all.append(self)

    def start(self) -> None:
        self.state = "started"

    def cancel(self) -> None:
        self.state = "cancelled"


@pytest.fixture
def watchdogs(monkeypatch: pytest.MonkeyPatch) -> list[Watchdog]:
    Watchdog.all = []
    monkeypatch.setattr(threading, "Timer", Watchdog)
    return Watchdog.all


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


async def test_the_time_of_work_is_limited_from_its_start_to_its_end(
    watchdogs: list[Watchdog], executor: ThreadPoolExecutor
) -> None:
    def work() -> int:
        assert watchdogs[-1].state == "started"
        return 5

    assert await run_interruptible(executor, work, 3.0) == 5
    assert [(x.seconds, x.state) for x in watchdogs] == [(3.0, "cancelled")]
    # It was about to bark: whatever the thread does next is not meant.
    watchdogs[0].bark()
    assert await run_interruptible(executor, work, 3.0) == 5


async def test_work_that_fails_is_over_too(
    watchdogs: list[Watchdog], executor: ThreadPoolExecutor
) -> None:
    def work() -> int:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await run_interruptible(executor, work, 3.0)
    assert watchdogs[0].state == "cancelled"
    watchdogs[0].bark()
    assert await run_interruptible(executor, lambda: 5, 3.0) == 5


async def test_work_that_takes_too_long_is_interrupted_and_the_thread_works_on(
    watchdogs: list[Watchdog], executor: ThreadPoolExecutor
) -> None:
    runs = threading.Event()

    def work() -> None:
        while True:
            try:
                runs.set()
            except Exception:  # which stops no interrupt
                continue

    working = asyncio.ensure_future(run_interruptible(executor, work, 3.0))
    assert await asyncio.to_thread(runs.wait, 60)
    watchdogs[0].bark()
    with pytest.raises(InterruptedWorkError):
        await asyncio.wait_for(working, 60)
    assert await run_interruptible(executor, lambda: 5, 3.0) == 5
