"""Work in a thread that can be interrupted when it takes too long."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class InterruptedWorkError(Exception):
    """The work took longer than it may."""


class _Interrupt(BaseException):
    """Raised in the thread, where no `except Exception` stops it."""


async def run_interruptible(
    executor: ThreadPoolExecutor, work: Callable[[], T], timeout_s: float
) -> T:
    """The result of Python code in a thread, whose time counts from when it starts.

    Raises what the work raises, or InterruptedWorkError. A single call of C code is not
    interrupted before it returns.
    """
    thread: list[int] = []
    ended = threading.Lock()

    def interruptible() -> T:
        watchdog = threading.Timer(timeout_s, interrupt)
        thread.append(threading.get_ident())
        watchdog.start()
        try:
            try:
                return work()
            finally:
                with ended:  # from here on nothing interrupts this thread
                    thread.clear()
                watchdog.cancel()
        except _Interrupt:
            raise InterruptedWorkError() from None

    def interrupt() -> None:
        with ended:
            for ident in thread:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(ident), ctypes.py_object(_Interrupt)
                )

    return await asyncio.get_running_loop().run_in_executor(executor, interruptible)
