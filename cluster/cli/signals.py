"""Ctrl-C, SIGTERM and SIGHUP: the first shuts down gracefully, the second does not wait."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
        # Under nohup, what closes the terminal is none of this process's business.
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._before = {
            number: signal.getsignal(number)
            for number in SIGNALS
            if number != signal.SIGHUP or not ignored
        }
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]

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
        for number in self._before:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Have the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._requested = not self._requested, True
        if number == signal.SIGHUP:
            self._leave_terminal()
        self._woken.put(None)
        if not first and self._hurry is not None:
            _thread.start_new_thread(self._hurry, ())
        if self._interrupt:
            self._interrupt = False  # once, so that the cleanup is not interrupted
            raise Stop()

    def _leave_terminal(self) -> None:
        """Write no more to a terminal that is closed, which would fail within the cleanup."""
        if self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminals:
                os.dup2(nowhere, stream)
            os.close(nowhere)


@contextlib.contextmanager
def hold_signals() -> Iterator[StopRequest]:
    """Handle the signals that end a program, and restore the previous handlers at the end."""
    request = StopRequest()
    request.install()
    try:
        yield request
    finally:
        request.restore()
