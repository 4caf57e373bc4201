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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kvmesh.cluster.config import build
from kvmesh.cluster.environment import local_variables
from kvmesh.cluster.ports import Port, PortBlock
from kvmesh.cluster.processes import adopt_orphans, descendants, end_descendants
from kvmesh.cluster.serve_config import anywhere, serve_config
from tests.cluster.e2e.harness import PATIENCE_S, wait_for

RAY = Path(sys.executable).with_name("ray")
SERVE = Path(sys.executable).with_name("serve")
TOKEN = "a-token-of-a-test-" * 2  # that the nodes ask for: other hosts may reach them
OBJECT_STORE = "--object-store-memory=100000000"


def node_address() -> str:
    """This host's, as Ray sees it. Asked of another process: see `pytest_collection_finish`."""
    code = "from ray.util import get_node_ip_address as address; print(address())"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


@dataclass
class RayNodes:
    """url: of the REST API; gcs: its address; commands: that run the nodes, by node id"""

    url: str
    gcs: str
    commands: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def kill(self, node: str) -> None:
        """As if its machine had lost power: every process of the node, at once."""
        command = psutil.Process(self.commands[node].pid)
        processes = [command, *command.children(recursive=True)]
        for process in processes:
            process.suspend()  # so that none sees another die
        for process in processes:
            process.kill()


@contextmanager
def ray_nodes(
    directory: Path, ports: PortBlock, values: dict[str, Any], *cpus: int
) -> Iterator[RayNodes]:
    """Nodes with nothing of kvmesh but its variables.

    directory: with a short path
    cpus: of the head and of each worker
    """
    variables = local_variables(build(values), directory / "p", ports)
    # Nodes find each other by this host's address: Ray replaces 127.0.0.1 by it.
    del variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
    # A node that is lost is missed within seconds. Elsewhere Ray's defaults apply.
    variables |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
    variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # the end of a test is no drain
    environment = {**os.environ, **variables, "RAY_AUTH_TOKEN": TOKEN}
    adopt_orphans()
    keep = descendants()
    gcs_port, dashboard_port = ports[Port.GCS], ports[Port.METRICS]
    gcs, url = f"{node_address()}:{gcs_port}", f"http://127.0.0.1:{dashboard_port}"
    nodes = RayNodes(url, gcs)
    roles = [["--head", f"--port={gcs_port}", f"--dashboard-port={dashboard_port}"]]
    roles[0].append(f"--temp-dir={directory / 'r'}")
    roles += [[f"--address={gcs}"] for _ in cpus[1:]]
    log = (directory / "ray.log").open("w")
    try:
        for role, count in zip(roles, cpus, strict=True):
            command = [str(RAY), "start", "--block", f"--num-cpus={count}", OBJECT_STORE]
            # A node's agent would have a fixed port, which only one node of a host can have.
            command += ["--dashboard-agent-listen-port=0", *role]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            # One after the other: nodes that start together choose the same names for sockets.
            wait_for(
                lambda: len(alive_nodes(url)) > len(nodes.commands),
                lambda: f"a node is up: {(directory / 'ray.log').read_text()}",
            )
            (node,) = alive_nodes(url) - nodes.commands.keys()
            nodes.commands[node] = process
        yield nodes
    finally:
        commands = list(nodes.commands.values())
        for process in reversed(commands):
            process.terminate()
        for process in commands:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        end_descendants(keep)
        log.close()


def _ask(url: str) -> Any:
    """Raises OSError."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    return urllib.request.urlopen(request, timeout=PATIENCE_S)


def answers(url: str) -> bool:
    try:
        with _ask(url) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def alive_nodes(url: str) -> set[str]:
    """Ids of the nodes that Ray's REST API knows to be alive; none while it does not answer."""
    try:
        with _ask(f"{url}/nodes?view=summary") as reply:
            summary = json.load(reply)["data"]["summary"]
    except OSError:
        return set()
    found = (node["raylet"] for node in summary)
    return {raylet["nodeId"] for raylet in found if raylet.get("state") == "ALIVE"}


def applications(url: str) -> dict[str, Any]:
    """What Serve knows of its applications, by name."""
    with _ask(f"{url}/api/serve/applications/") as reply:
        found: dict[str, Any] = json.load(reply)["applications"]
    return found


def application(url: str) -> dict[str, Any]:
    """What Serve knows of kvmesh's."""
    found: dict[str, Any] = applications(url)["kvmesh"]
    return found


def deployable(values: dict[str, Any]) -> dict[str, Any]:
    """What Serve is given for these settings, which have host and ports."""
    return serve_config(anywhere(build(values), os.environ))


def deploy(url: str, config: Path) -> None:
    """By the command of Serve, and wait until it runs."""
    command = [str(SERVE), "deploy", "--address", url, str(config)]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr

    def running() -> bool:
        found = application(url)
        assert found["status"] != "DEPLOY_FAILED", found["message"]
        return bool(found["status"] == "RUNNING")

    wait_for(running, lambda: f"running: {application(url)}", period_s=0.5)


def nodes_of(found: dict[str, Any], deployment: str) -> dict[str, str]:
    """By id, the node of each of a deployment's replicas."""
    replicas = found["deployments"][deployment]["replicas"]
    return {replica["replica_id"]: replica["node_id"] for replica in replicas}
