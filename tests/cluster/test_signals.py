"""Signals that come while others are handled, or while the main thread holds a lock."""

from __future__ import annotations

import signal
import threading

import pytest

from kvmesh.cluster.cli.signals import Stop, hold_signals

PATIENCE_S = 60.0


def test_a_repeated_signal_takes_no_lock_that_the_main_thread_holds() -> None:
    hurried = threading.Event()
    with hold_signals() as stop:
        stop.on_repeat(hurried.set)
        signal.raise_signal(signal.SIGINT)
        assert not hurried.is_set()
        with hurried._cond:  # type: ignore[attr-defined]  # as in the middle of its `wait`
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
        assert hurried.wait(PATIENCE_S)


def test_waiting_ends_at_the_first_signal() -> None:
    checks: list[None] = []

    def check() -> None:
        checks.append(None)
        signal.raise_signal(signal.SIGTERM)

    with hold_signals() as stop:
        stop.wait(check)
        assert len(checks) == 1
        stop.wait(check)
    assert len(checks) == 1


def test_a_signal_interrupts_a_start_once() -> None:
    cleaned = False
    with hold_signals() as stop:
        with pytest.raises(Stop), stop.interrupting():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned = True
        signal.raise_signal(signal.SIGINT)
    assert cleaned
