"""Threads in which no tenant keeps out another."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvmesh.cluster.errors import IngressBusyError

T = TypeVar("T")


class TenantThreads:
    """Threads for one piece of work at a time of each tenant, in the order in which it came.

    All methods belong to one event loop.

    what: is worked on, in the plural, for errors
    max_waiting: of a tenant; more is refused
    """

    def __init__(self, threads: int, what: str, max_waiting: int) -> None:
        self._threads = ThreadPoolExecutor(threads, f"kvmesh-{what.replace(' ', '-')}")
        self._what = what
        self._max_waiting = max_waiting
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(1))
        self._waiting: Counter[str] = Counter()  # by tenant

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns; a caller that leaves does not end its turn.

        Raises what the work raises, and IngressBusyError.
        """
        if self._waiting[tenant] >= self._max_waiting:
            raise IngressBusyError(f"{self._max_waiting} {self._what} wait for a thread already")
        turn, loop = self._turns[tenant], asyncio.get_running_loop()
        self._waiting[tenant] += 1
        try:
            await turn.acquire()
        finally:
            self._waiting[tenant] -= 1
        try:
            job = self._threads.submit(work)
        except RuntimeError:  # it is closed, which those that wait are to hear as well
            turn.release()
            raise
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(turn.release))
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Wait for nothing: what runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
