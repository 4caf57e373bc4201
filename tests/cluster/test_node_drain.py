"""What is left on a node that is drained, by Serve's own account; and which nodes drain."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest

from kvmesh.cluster.node_drain import replicas_on


def replicas(*nodes: str) -> dict[str, Any]:
    return {"replicas": [{"node_id": node} for node in nodes]}


def test_replicas_of_all_applications_count() -> None:
    starting = {"replicas": [{"state": "STARTING"}]}
    deployments = (
        {"router": replicas("a"), "ingress": replicas("a", "b")},
        {"x": replicas("a"), "y": starting},
    )
    applications = {str(number): {"deployments": each} for number, each in enumerate(deployments)}
    details = {"applications": applications}
    assert [replicas_on(node, details) for node in ("a", "b", "c")] == [3, 1, 0]


async def test_nodes_are_asked_for_again_when_ray_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import RpcError

    from kvmesh.cluster import draining_nodes

    answers: list[frozenset[str] | Exception] = [
        RpcError("no head"),
        RpcError("no head"),
        frozenset({"a"}),
        RuntimeError("no connection"),
        frozenset(),
    ]

    def ask() -> frozenset[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(draining_nodes, "draining_nodes", ask)
    monkeypatch.setattr(draining_nodes, "POLL_S", 0.0)
    seen: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    following = asyncio.create_task(draining_nodes.follow_draining_nodes(seen.put_nowait))
    async with asyncio.timeout(60):
        assert [await seen.get(), await seen.get()] == [frozenset({"a"}), frozenset()]
    following.cancel()


def test_a_process_that_imported_ray_without_authentication_is_refused_at_once() -> None:
    """Not in this process, which has not."""
    code = (
        "import ray\n"
        "from kvmesh.cluster.config import build\n"
        "from kvmesh.cluster.errors import StartError\n"
        "from kvmesh.cluster.lifecycle import Cluster\n"
        "try:\n"
        "    Cluster(build({})).start()\n"
        "except StartError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "has imported Ray already" in done.stdout
