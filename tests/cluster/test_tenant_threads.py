"""Threads that tenants share."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvmesh.cluster.errors import IngressBusyError
from kvmesh.cluster.ingress.tenant_threads import TenantThreads
from tests.cluster.machine import PATIENCE_S


async def test_a_tenant_has_one_thread_at_a_time_and_as_many_wait_as_may() -> None:
    threads, leave = TenantThreads(2, "texts", 2), threading.Event()
    first = asyncio.create_task(threads.run("a", leave.wait))
    others = [asyncio.create_task(threads.run("a", lambda: 7)) for _ in range(2)]
    assert await asyncio.wait_for(threads.run("b", lambda: 8), PATIENCE_S) == 8
    with pytest.raises(IngressBusyError, match="2 texts wait"):
        await threads.run("a", lambda: 9)
    assert not any(task.done() for task in others)
    leave.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await asyncio.gather(first, *others) == [True, 7, 7]
    threads.close()


async def test_all_that_wait_hear_that_the_threads_are_closed() -> None:
    threads, leave = TenantThreads(1, "texts", 9), threading.Event()
    first = asyncio.create_task(threads.run("a", leave.wait))
    waiting = [asyncio.create_task(threads.run("a", lambda: 7)) for _ in range(3)]
    await asyncio.sleep(0)
    threads.close()
    leave.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await first
        ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [RuntimeError] * 3
