"""What `kvmesh serve` does when a process of Ray has died, without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import typer

from kvmesh.cluster import deployment, lifecycle
from kvmesh.cluster import local_ray as local_ray_module
from kvmesh.cluster.cli.exits import ExitCode, friendly_errors
from kvmesh.cluster.cli.signals import hold_signals
from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.errors import RayDiedError, StartError
from kvmesh.cluster.lifecycle import Cluster
from kvmesh.cluster.local_ray import LocalRay
from kvmesh.cluster.ports import PortBlock


def local_ray(**processes: psutil.Process) -> LocalRay:
    local = LocalRay(PortBlock((), 0))  # no port is taken
    local._processes = processes
    return local


@pytest.mark.parametrize("error", [Exception("timed out"), RuntimeError("no GCS"), OSError("full")])
def test_it_says_why_ray_has_not_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def start_node(config: ClusterConfig, directory: Path, gcs_port: int) -> None:
        raise error

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(local_ray_module, "start_node", start_node)
    before = dict(os.environ)
    local = local_ray()
    with pytest.raises(StartError, match=f"^Ray did not start: {error}$"):
        local.start(ClusterConfig())
    local.end()
    local.release()
    assert dict(os.environ) == before


def test_it_stops_waiting_and_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(ClusterConfig())
    cluster.check_alive()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        cluster._local = local_ray(raylet=psutil.Process(ended.pid))
        with hold_signals() as stop, pytest.raises(typer.Exit) as caught, friendly_errors():
            stop.wait(cluster.check_alive)
    assert caught.value.exit_code == ExitCode.FAILED
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: raylet, a process of Ray, has died")
    assert "\n" not in line


def test_the_error_says_what_to_do() -> None:
    cluster = Cluster(ClusterConfig())
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        cluster._local = local_ray(gcs_server=psutil.Process(ended.pid))
        ended.wait()
    with pytest.raises(RayDiedError, match=r"gcs_server.*Start it again"):
        cluster.check_alive()


class FakeLocalRay:
    """Notes what is ended, in order. dead: Ray's process that has died"""

    def __init__(self, dead: str | None, ended: list[str]) -> None:
        self._dead = dead
        self._ended = ended

    def dead_part(self) -> str | None:
        return self._dead

    def stop(self) -> None:
        self._ended.append("Ray's own processes")

    def end(self) -> None:
        self._ended.append("all others, and the files")

    def release(self) -> None:
        self._ended.append("ports and variables")


@pytest.mark.parametrize(
    ("local", "dead", "expected"),
    [
        (True, None, ["Serve", "the connection", "Ray's own processes",
                      "all others, and the files", "the connection", "ports and variables"]),
        # What is dead cannot end the rest in order, and to leave it first would wait for it.
        (True, "raylet", ["all others, and the files", "the connection", "ports and variables"]),
        (False, None, ["Serve", "the connection", "the connection"]),
    ],
)  # fmt: skip
def test_nothing_is_left_of_a_cluster_that_is_stopped(
    monkeypatch: pytest.MonkeyPatch, local: bool, dead: str | None, expected: list[str]
) -> None:
    ended: list[str] = []
    ray = SimpleNamespace(
        is_initialized=lambda: True, shutdown=lambda: ended.append("the connection")
    )
    monkeypatch.setattr(lifecycle, "import_ray", lambda: ray)
    cluster = Cluster(ClusterConfig())
    monkeypatch.setattr(cluster, "_stop_serving", lambda: ended.append("Serve"))
    cluster._started = cluster._deployed = True
    cluster._local = FakeLocalRay(dead, ended) if local else None  # type: ignore[assignment]
    cluster.stop()
    assert ended == expected
    cluster.stop()
    assert ended == expected, "once"


class FailingLocalRay(FakeLocalRay):
    """Cannot end Ray's own processes."""

    def stop(self) -> None:
        super().stop()
        raise OSError("stop")


@pytest.mark.parametrize("fails", ["progress", "drain", "Serve", "the connection"])
def test_nothing_is_left_whatever_a_step_raises(
    monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    ended: list[str] = []

    def step(name: str) -> None:
        ended.append(name)
        if name == fails:
            raise OSError(name)

    def progress(text: str, share: float | None) -> None:
        if text == "stopping Ray" and fails == "progress":
            raise OSError(text)

    ray = SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: step("the connection"))
    monkeypatch.setattr(lifecycle, "import_ray", lambda: ray)
    cluster = Cluster(ClusterConfig(), progress)
    monkeypatch.setattr(cluster, "_wait_for_requests", lambda: step("drain"))
    monkeypatch.setattr(cluster, "_stop_serving", lambda: step("Serve"))
    cluster._started = cluster._deployed = True
    cluster._local = FailingLocalRay(None, ended)  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"^(stop|the connection)$"):
        cluster.stop()
    assert ended == [
        "drain",
        "Serve",
        "the connection",
        "Ray's own processes",
        "all others, and the files",
        "the connection",
        "ports and variables",
    ]
    cluster.stop()
    assert ended[-1] == "ports and variables" and len(ended) == 7, "once"


@pytest.mark.parametrize(("connected", "deployed"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("local", [True, False])
def test_a_start_that_fails_early_leaves_other_clusters_alone(
    monkeypatch: pytest.MonkeyPatch, local: bool, connected: bool, deployed: bool
) -> None:
    """Serve connects to any Ray cluster that it finds, and another's may have this name."""
    ended: list[str] = []
    ray = SimpleNamespace(is_initialized=lambda: connected, shutdown=lambda: None)
    monkeypatch.setattr(lifecycle, "import_ray", lambda: ray)
    cluster = Cluster(ClusterConfig())
    monkeypatch.setattr(cluster, "_stop_serving", lambda: ended.append("Serve"))
    cluster._started, cluster._deployed = True, deployed
    cluster._local = FakeLocalRay(None, ended) if local else None  # type: ignore[assignment]
    cluster.stop()
    assert "Serve" not in ended


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (True, []),
        (
            ValueError("1 validation error\n  for Serve"),
            ["at auto", "1 validation error for Serve"],
        ),
        (TimeoutError(), ["at auto", "TimeoutError"]),
        (False, ["at auto is still ending"]),
    ],
)
def test_an_application_that_could_not_be_withdrawn_is_reported(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ended: bool | Exception,
    said: list[str],
) -> None:
    def withdraw(timeout_s: float, hurry: threading.Event) -> bool:
        assert timeout_s > cluster._config.timeouts.drain_s
        if isinstance(ended, bool):
            return ended
        raise ended

    ray = SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: None)
    monkeypatch.setattr(lifecycle, "import_ray", lambda: ray)
    monkeypatch.setattr(deployment, "withdraw", withdraw)
    cluster = Cluster(build({"ray": {"address": "auto"}}))
    cluster._started = cluster._deployed = True
    cluster.stop()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said)
    assert all(words in lines[0] for words in said)


@pytest.mark.parametrize(
    ("polls", "timeout_s", "hurried", "ended"),
    [(0, 9.0, False, True), (3, 9.0, False, True), (9, 9.0, True, False), (9, -1.0, False, False)],
)
def test_the_end_of_an_application_is_waited_for_unless_it_hurries(
    monkeypatch: pytest.MonkeyPatch, polls: int, timeout_s: float, hurried: bool, ended: bool
) -> None:
    """polls: in how many it is still ending"""
    from ray.serve import context

    states = ["DELETING"] * polls + ["NOT_STARTED"]
    deleted: list[str] = []

    def delete_apps(names: list[str], *, blocking: bool) -> None:
        assert not blocking
        deleted.extend(names)

    def get_serve_status(name: str) -> SimpleNamespace:
        return SimpleNamespace(app_status=SimpleNamespace(status=states.pop(0)))

    client = SimpleNamespace(delete_apps=delete_apps, get_serve_status=get_serve_status)
    monkeypatch.setattr(context, "_get_global_client", lambda **_: client)
    monkeypatch.setattr(deployment, "_apply", lambda *_: None)
    monkeypatch.setattr(deployment, "POLL_S", 0.0)
    hurry = threading.Event()
    if hurried:
        hurry.set()
    assert deployment.withdraw(timeout_s, hurry) is ended
    assert deleted == ["kvmesh"]
    assert len(states) == (0 if ended else polls)
    monkeypatch.setattr(context, "_get_global_client", lambda **_: None)
    assert deployment.withdraw(timeout_s, hurry), "Serve does not run"
