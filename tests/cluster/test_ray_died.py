"""What `kvmesh serve` does when a process of Ray has died, without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import typer

from kvmesh.cluster import local_ray as local_ray_module
from kvmesh.cluster.cli.exits import ExitCode, friendly_errors
from kvmesh.cluster.cli.signals import hold_signals
from kvmesh.cluster.config import ClusterConfig
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
