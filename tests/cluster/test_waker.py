"""However many streams have output, each turn of the event loop serves a few, in order."""

from __future__ import annotations

import asyncio

from kvmesh.cluster.ingress.waker import Waker


async def test_streams_are_woken_in_order_a_few_per_turn() -> None:
    waker = Waker(streams_per_turn=4)
    events = [asyncio.Event() for _ in range(10)]
    for event in events:
        waker.wake(event)
    counts = []
    while not events[-1].is_set():
        counts.append(sum(event.is_set() for event in events))
        assert all(event.is_set() for event in events[: counts[-1]])
        await asyncio.sleep(0)  # one turn
    assert counts == [0, 4, 8]


async def test_a_stream_that_comes_back_queues_after_the_others() -> None:
    waker = Waker(streams_per_turn=1)
    first, second = asyncio.Event(), asyncio.Event()
    waker.wake(first)
    waker.wake(second)
    await first.wait()
    first.clear()
    waker.wake(first)
    await second.wait()
    assert not first.is_set()
    await first.wait()


async def test_a_waker_that_had_nothing_to_do_starts_again() -> None:
    waker = Waker()
    for _ in range(3):
        event = asyncio.Event()
        waker.wake(event)
        await asyncio.wait_for(event.wait(), 60)
