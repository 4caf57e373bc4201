"""Ctrl-C and SIGTERM: the first shuts down gracefully, the second does not wait."""

from __future__ import annotations

import _thread
import contextlib
import signal
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    """Raised in the main thread by a signal while a cluster starts, like KeyboardInterrupt."""


class StopRequest:
    """Whether a signal asked this process to stop, and what to do at the next one.

    A handler runs in the main thread between any two instructions, also of another handler: it must
    take no lock, which that thread may hold already.
    """

    def __init__(self) -> None:
        self._requested = False
        self._woken: SimpleQueue[None] = SimpleQueue()  # its `put` may interrupt its `get`
        self._interrupt = False
        self._hurry: Callable[[], None] | None = None

    def on_repeat(self, hurry: Callable[[], None]) -> None:
        """Call `hurry` at every signal after the first."""
        self._hurry = hurry

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Until `wait_ready`, the next signal raises Stop in the main thread."""
        self._interrupt = True
        self.install()
        try:
            yield
        finally:
            self._interrupt = False

    def wait_ready(self) -> None:
        """From now on, signals end `wait` instead of raising Stop."""
        self._interrupt = False
        self.install()

    def wait(self, check: Callable[[], None]) -> None:
        """Block until the first signal, or until `check`, called every second, raises."""
        while not self._requested:
            with contextlib.suppress(Empty):
                self._woken.get(timeout=1.0)
                continue
            # Ray replaces the signal handlers of the process that starts it.
            self.install()
            check()

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._requested = not self._requested, True
        self._woken.put(None)
        if not first and self._hurry is not None:
            _thread.start_new_thread(self._hurry, ())
        if self._interrupt:
            self._interrupt = False  # once, so that the cleanup is not interrupted
            raise Stop()


@contextlib.contextmanager
def hold_signals() -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM, and restore the previous handlers at the end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    request = StopRequest()
    request.install()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
