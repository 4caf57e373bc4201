"""A Ray cluster of several nodes on this machine, which Serve's REST API deploys to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmesh.cluster.config import build
from kvmesh.cluster.environment import local_variables
from kvmesh.cluster.ports import PortBlock
from kvmesh.cluster.processes import adopt_orphans, descendants, end_descendants
from tests.cluster.e2e.harness import wait_for

RAY = Path(sys.executable).with_name("ray")
SERVE = Path(sys.executable).with_name("serve")
TOKEN = "a-token-of-a-test-" * 2  # that the nodes ask for: other hosts may reach them
OBJECT_STORE = "--object-store-memory=100000000"


def node_address() -> str:
    """This host's, as Ray sees it. Asked of another process: see `pytest_collection_finish`."""
    code = "from ray.util import get_node_ip_address as address; print(address())"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


@contextmanager
def ray_nodes(
    directory: Path, ports: PortBlock, values: dict[str, Any], *cpus: int
) -> Iterator[tuple[str, str]]:
    """Nodes with nothing of kvmesh but its variables; the addresses of REST API and GCS.

    directory: with a short path
    cpus: of the head and of each worker
    """
    variables = local_variables(build(values), directory / "p", ports)
    # Nodes find each other by this host's address: Ray replaces 127.0.0.1 by it.
    del variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
    environment = {**os.environ, **variables, "RAY_AUTH_TOKEN": TOKEN}
    adopt_orphans()
    keep = descendants()
    gcs, url = f"{node_address()}:{ports.single(8)}", f"http://127.0.0.1:{ports.single(7)}"
    roles = [["--head", f"--port={ports.single(8)}", f"--dashboard-port={ports.single(7)}"]]
    roles[0].append(f"--temp-dir={directory / 'r'}")
    roles += [[f"--address={gcs}"] for _ in cpus[1:]]
    log = (directory / "ray.log").open("w")
    started = []
    try:
        for role, count in zip(roles, cpus, strict=True):
            command = [str(RAY), "start", "--block", f"--num-cpus={count}", OBJECT_STORE]
            # A node's agent would have a fixed port, which only one node of a host can have.
            command += ["--dashboard-agent-listen-port=0", *role]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            wait_for(
                lambda: answers(f"{url}/api/serve/applications/"),
                lambda: f"Ray's REST API: {(directory / 'ray.log').read_text()}",
                within_s=120,
            )
        yield url, gcs
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        end_descendants(keep)
        log.close()


def _ask(url: str) -> Any:
    """Raises OSError."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    return urllib.request.urlopen(request, timeout=30)


def answers(url: str) -> bool:
    try:
        with _ask(url) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def applications(url: str) -> dict[str, Any]:
    """What Serve knows of its applications, by name."""
    with _ask(f"{url}/api/serve/applications/") as reply:
        found: dict[str, Any] = json.load(reply)["applications"]
    return found


def application(url: str) -> dict[str, Any]:
    """What Serve knows of kvmesh's."""
    found: dict[str, Any] = applications(url)["kvmesh"]
    return found


def deploy(url: str, config: Path) -> None:
    """By the command of Serve, and wait until it runs."""
    command = [str(SERVE), "deploy", "--address", url, str(config)]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr

    def running() -> bool:
        found = application(url)
        assert found["status"] != "DEPLOY_FAILED", found["message"]
        return bool(found["status"] == "RUNNING")

    wait_for(running, lambda: f"running: {application(url)}", within_s=240, period_s=0.5)


def nodes_of(found: dict[str, Any], deployment: str) -> dict[str, str]:
    """By id, the node of each of a deployment's replicas."""
    replicas = found["deployments"][deployment]["replicas"]
    return {replica["replica_id"]: replica["node_id"] for replica in replicas}
