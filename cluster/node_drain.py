"""Moving what runs on this node of a Ray cluster elsewhere, before the node ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvmesh.cluster.errors import StartError
from kvmesh.cluster.joining import join_ray

POLL_S = 1.0


def drain_node(
    timeout_s: float,
    report: Callable[[int], None],
    *,
    address: str = "auto",
    node_id: str | None = None,
) -> bool:
    """Have Serve replace a node's processes on other nodes, and wait until they have ended.

    A process is replaced before it ends where the others have room for both; otherwise it drains
    in time before the deadline. Its streams end there, or continue elsewhere.

    timeout_s: after this time the node may end
    report: called with the number of processes that are left
    address: of the Ray cluster
    node_id: in hexadecimal; this node if None
    Returns whether they have all ended. Raises StartError if there is no cluster to ask.
    """
    join_ray(address)
    import ray
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    deadline = time.monotonic() + timeout_s
    try:
        node = node_id or ray.get_runtime_context().get_node_id()
        _announce(ray.get_runtime_context().gcs_address, node, timeout_s)
        client = _get_global_client()
        assert client is not None, "it raises if Serve does not run"
        while left := replicas_on(node, client.get_serve_details()):
            report(left)
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
    except (RayError, RayServeException, ConnectionError, RuntimeError) as error:
        raise StartError(f"the node cannot be drained: {error}") from error
    finally:
        ray.shutdown()
    return True


def _announce(gcs_address: str, node: str, timeout_s: float) -> None:
    """Tell Ray that the node ends. Ray has a command for that, and no function."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += [f"--address={gcs_address}", f"--node-id={node}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=it ends"]
    command += [f"--deadline-remaining-seconds={max(int(timeout_s), 1)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip())


def replicas_on(node: str, details: Mapping[str, Any]) -> int:
    """The number of Serve's replicas on a node. details: of Serve's state

    A replica that has no place yet has no node either.
    """
    return sum(
        replica.get("node_id") == node
        for application in details["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    )
