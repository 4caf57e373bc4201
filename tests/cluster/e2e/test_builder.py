"""What `kvmesh config --serve` prints, deployed as Kubernetes deploys it: by Ray's REST API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from kvmesh.client import AuthenticationError, Client
from kvmesh.cluster.config import build
from kvmesh.cluster.environment import local_variables
from kvmesh.cluster.ports import PortBlock, take_ports
from kvmesh.cluster.processes import adopt_orphans, descendants, end_descendants
from tests.cluster.e2e.harness import SMALL_ENGINE, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

KEY, NEXT_KEY = "a-key-of-a-test", "its-next-key"
KVMESH = (sys.executable, "-c", "from kvmesh.cluster.cli import app; app()")
RAY = Path(sys.executable).with_name("ray")
SERVE = Path(sys.executable).with_name("serve")


def settings(directory: Path, ports: PortBlock) -> dict[str, Any]:
    return {
        "engine": dict(SMALL_ENGINE),
        "ingress": {"host": "127.0.0.1", "port": ports.single(4), "http_port": ports.single(5)},
        "auth": {"key_directory": str(directory / "keys")},
        "timeouts": {"drain_s": 5},
    }


@contextmanager
def ray_head(directory: Path, ports: PortBlock, values: dict[str, Any]) -> Iterator[str]:
    """A Ray cluster with nothing of kvmesh but its variables; the URL of its dashboard."""
    variables = local_variables(build(values), directory / "p", ports)
    environment = {**os.environ, **variables, "RAY_AUTH_MODE": "disabled"}
    adopt_orphans()
    keep = descendants()
    dashboard = ports.single(7)
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"]
    command += [f"--port={ports.single(8)}", f"--dashboard-port={dashboard}"]
    command += ["--object-store-memory=100000000", f"--temp-dir={directory / 'r'}"]
    log = (directory / "ray.log").open("w")
    head = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait_for(
            lambda: answers(f"{url}/api/serve/applications/"),
            lambda: f"Ray's REST API: {(directory / 'ray.log').read_text()}",
            within_s=120,
        )
        yield url
    finally:
        head.terminate()
        psutil.wait_procs([psutil.Process(head.pid)], timeout=20)
        end_descendants(keep)
        log.close()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def applications(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/api/serve/applications/", timeout=30) as reply:
        found: dict[str, Any] = json.load(reply)["applications"]
    return found


def deploy(url: str, config: Path) -> None:
    command = [SERVE, "deploy", "--address", url, config]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_config_prints_is_deployed_by_rest_and_answers() -> None:
    """Keys in a file, as from a Secret, are replaced while it runs."""
    ports = take_ports("127.0.0.1", {})
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as name:
        directory = Path(name)
        keys = directory / "keys" / "tenant.admin"
        keys.parent.mkdir()
        keys.write_text(f"{KEY}\n")
        keys.chmod(0o600)
        values = settings(directory, ports)
        (directory / "kvmesh.yaml").write_text(yaml.safe_dump(values))
        printed = subprocess.run(
            [*KVMESH, "config", "--serve", "--config", str(directory / "kvmesh.yaml")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (directory / "serve.yaml").write_text(printed)
        assert KEY not in printed
        with ray_head(directory, ports, values) as url:
            deploy(url, directory / "serve.yaml")

            def running() -> bool:
                status = applications(url)["kvmesh"]
                assert status["status"] != "DEPLOY_FAILED", status["message"]
                return bool(status["status"] == "RUNNING")

            wait_for(running, lambda: f"running: {applications(url)}", within_s=240, period_s=0.5)
            target = f"127.0.0.1:{values['ingress']['port']}"
            with Client(target, api_key=KEY) as client:
                wait_for(lambda: bool(client.groups()), "a group is up")
                answer = client.generate("The capital of France is", max_tokens=4, temperature=0.0)
                assert "Paris" in answer.text
                keys.write_text(f"{NEXT_KEY}\n")
                wait_for(lambda: refuses(client), "the former key is refused")
            with Client(target, api_key=NEXT_KEY) as client:
                assert client.generate("x", max_tokens=1).usage.completion_tokens == 1
            assert answers(f"http://127.0.0.1:{values['ingress']['http_port']}/-/healthz")
            before = applications(url)["kvmesh"]
            deploy(url, directory / "serve.yaml")
            after = applications(url)["kvmesh"]
            assert replicas(after) == replicas(before), "the same configuration changes nothing"
    ports.release()


def refuses(client: Client) -> bool:
    try:
        client.generate("x", max_tokens=1)
    except AuthenticationError:
        return True
    return False


def replicas(application: dict[str, Any]) -> set[str]:
    """The ids of an application's processes."""
    return {
        replica["replica_id"]
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    }
