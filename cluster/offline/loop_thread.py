"""An event loop in a thread of its own, for callers that block, whatever loop they may have."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from kvmesh.client.errors import ClosedError

T = TypeVar("T")


class DaemonThreads(ThreadPoolExecutor):
    """Runs each call in a thread of its own, which does not keep a program from ending."""

    def submit(self, call: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from now on it cannot be cancelled

        def run() -> None:
            try:
                future.set_result(call(*args, **options))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="kvmesh-call", daemon=True).start()
        return future


class LoopThread:
    """Runs coroutines for other threads. It does not keep a program from ending."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(DaemonThreads())
        self._calls: set[asyncio.Task[Any]] = set()
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="kvmesh-loop", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Cancelling the future cancels the coroutine. Raises ClosedError."""
        if self.closed:
            raise ClosedError("the LLM has been closed")
        return asyncio.run_coroutine_threadsafe(self._call(work), self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it. Raises ClosedError if the loop ends meanwhile."""
        return self.wait(self.submit(work))

    def wait(self, future: Future[T]) -> T:
        """What a future has in the end. An exception of the waiting thread, such as that of a
        Ctrl-C, cancels it. Raises ClosedError if the loop ends meanwhile.
        """
        try:
            return future.result()
        except CancelledError:
            raise ClosedError("the LLM has been closed") from None
        except BaseException:
            future.cancel()
            raise

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel what runs, then run `last`, and end. Returns at once; see `join`. Idempotent."""
        if self.closed:
            return
        self.closed = True

        async def end() -> None:
            try:
                for task in self._calls:
                    task.cancel()
                await asyncio.gather(*self._calls, return_exceptions=True)
                await last()
            finally:
                self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)

    def join(self) -> None:
        self._thread.join()

    async def _call(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            return await work
        finally:
            self._calls.discard(task)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
