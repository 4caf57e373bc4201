"""Ctrl-C and SIGTERM: the first shuts down in order, the second without waiting."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    """Raised in the main thread by a signal while a cluster starts; like KeyboardInterrupt."""


class StopRequest:
    """Whether, and how urgently, this process was asked to end."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._interrupt = False
        self._hurry: Callable[[], None] | None = None

    def on_repeat(self, hurry: Callable[[], None]) -> None:
        """What to call when the second signal comes."""
        self._hurry = hurry

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Until `wait_ready`, the first signal raises Stop wherever the main thread is."""
        self._interrupt = True
        self.install()
        try:
            yield
        finally:
            self._interrupt = False

    def wait_ready(self) -> None:
        """From here on `wait` is where signals are noticed."""
        self._interrupt = False
        self.install()

    def wait(self) -> None:
        """Until the first signal."""
        while not self._asked.wait(1.0):
            # Ray replaces the handlers of a process that it is started in.
            self.install()

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self._asked.is_set()
        self._asked.set()
        if not first and self._hurry is not None:
            self._hurry()
        if self._interrupt:
            self._interrupt = False  # once: cleaning up must not be interrupted in turn
            raise Stop()


@contextlib.contextmanager
def hold_signals() -> Iterator[StopRequest]:
    """Takes over SIGINT and SIGTERM, and gives them back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    request = StopRequest()
    request.install()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
