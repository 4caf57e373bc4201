"""Signals that come while others are handled, or while the main thread holds a lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType, SimpleNamespace

import pytest

from kvmesh.cluster.cli import running as running_module
from kvmesh.cluster.cli.running import running
from kvmesh.cluster.cli.signals import Stop, hold_signals
from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.lifecycle import Cluster
from kvmesh.cluster.local_ray import own_sigterm

PATIENCE_S = 60.0
# After its terminal was closed: what it writes there before it ends would fail.
SERVING = """
import sys
from kvmesh.cluster.cli.signals import hold_signals
with hold_signals() as stop:
    print("up", flush=True)
    stop.wait(lambda: None)
    print("shutting down", file=sys.stderr, flush=True)
print("ended")
"""


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


def ray_init(*signals: signal.Signals) -> None:
    """Does to SIGTERM what ray.init does; `signals` come meanwhile."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(number)

    signal.signal(signal.SIGTERM, leave)
    for number in signals:
        signal.raise_signal(number)


class FakeCluster(Cluster):
    """One that starts Ray, during which `meanwhile` come, and gets SIGTERM afterwards."""

    meanwhile: tuple[signal.Signals, ...] = ()

    def start(self) -> object:  # type: ignore[override]
        with own_sigterm():
            ray_init(*self.meanwhile)
        signal.raise_signal(signal.SIGTERM)
        return SimpleNamespace()

    def stop(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        ENDED.append("all")


ENDED: list[str] = []


@pytest.mark.parametrize("meanwhile", [(), (signal.SIGTERM,)])
def test_sigterm_while_ray_starts_or_after_it_leaves_nothing_behind(
    meanwhile: tuple[signal.Signals, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it comes: Ray's handler would exit within the cleanup."""
    monkeypatch.setattr(running_module, "Cluster", FakeCluster)
    monkeypatch.setattr(FakeCluster, "meanwhile", meanwhile)
    ENDED.clear()
    with hold_signals() as stop:
        with pytest.raises(Stop), running(ClusterConfig(), stop):
            pytest.fail("it has started")
        assert ENDED == ["all"]


def test_without_a_handler_of_ones_own_rays_stays() -> None:
    """It ends what runs, which the default would not."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit), own_sigterm():
            ray_init(signal.SIGTERM)
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_closed_terminal_shuts_down_gracefully() -> None:
    terminal, stderr = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SERVING], stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as serving:
        os.close(stderr)
        assert serving.stdout is not None
        assert serving.stdout.readline() == "up\n"
        os.close(terminal)
        serving.send_signal(signal.SIGHUP)
        assert serving.stdout.read() == "ended\n"
    assert serving.returncode == 0


def test_what_is_started_to_outlive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with hold_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
