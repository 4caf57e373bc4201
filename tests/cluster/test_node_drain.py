"""What is left on a node that is drained, by Serve's own account; and which nodes drain."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kvmesh.cluster import node_drain
from kvmesh.cluster.errors import StartError
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


class Drained:
    """A cluster with Ray and Serve as a drain sees them. said: what Ray's command answers

    left: what Serve says, question by question, of the replicas that are left on node `here`
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray
        from ray.serve import context

        self.said = subprocess.CompletedProcess([], 0, "", "")
        self.left: list[int | Exception] = [0]
        self.commands: list[list[str]] = []
        self.connected = 0
        runs = SimpleNamespace(get_node_id=lambda: "here", gcs_address="h:1")
        client = SimpleNamespace(get_serve_details=self._details)
        for where, name, what in (
            (node_drain, "join_ray", self._join),
            (node_drain, "POLL_S", 0.0),
            (subprocess, "run", self._run),
            (ray, "get_runtime_context", lambda: runs),
            (ray, "shutdown", self._leave),
            (context, "_get_global_client", lambda: client),
        ):
            monkeypatch.setattr(where, name, what)

    def _join(self, address: str) -> None:
        self.connected += 1

    def _leave(self) -> None:
        self.connected -= 1

    def _run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        return self.said

    def _details(self) -> dict[str, Any]:
        left = self.left.pop(0)
        if isinstance(left, Exception):
            raise left
        return {"applications": {"a": {"deployments": {"d": replicas("b", *["here"] * left)}}}}


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> Drained:
    return Drained(monkeypatch)


@pytest.mark.parametrize(("node_id", "node"), [(None, "here"), ("f00", "f00")])
def test_ray_hears_which_node_ends_and_when(
    drained: Drained, node_id: str | None, node: str
) -> None:
    drained.left = [0]
    assert node_drain.drain_node(90.5, lambda _: None, node_id=node_id)
    (command,) = drained.commands
    assert {"--address=h:1", f"--node-id={node}", "--deadline-remaining-seconds=90"} <= {*command}
    node_drain._announce("h:1", node, 0.5)
    assert "--deadline-remaining-seconds=1" in drained.commands[1], "at least"


def test_a_drain_ends_when_nothing_is_left_or_its_time_is_over(drained: Drained) -> None:
    reports: list[int] = []
    drained.left = [2, 2, 1, 0]
    assert node_drain.drain_node(60.0, reports.append)
    assert reports == [2, 2, 1]
    drained.left = [3]
    assert not node_drain.drain_node(-1.0, reports.append)
    assert reports == [2, 2, 1, 3]
    assert drained.connected == 0


@pytest.mark.parametrize(
    ("stdout", "stderr", "words"),
    [("usage: …", "no such node\n", "no such node"), ("refused\n", "", "refused")],
)
def test_a_drain_that_ray_refuses_ends_with_its_words(
    drained: Drained, stdout: str, stderr: str, words: str
) -> None:
    drained.said = subprocess.CompletedProcess([], 1, stdout, stderr)
    with pytest.raises(StartError, match=f"^the node cannot be drained: {words}$"):
        node_drain.drain_node(60.0, lambda _: pytest.fail("nobody moves what is left"))
    assert drained.connected == 0


def test_a_drain_ends_with_the_error_of_ray_or_serve(drained: Drained) -> None:
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    for error in (RayError("a"), RayServeException("a"), ConnectionError("a"), RuntimeError("a")):
        drained.left = [1, error]
        with pytest.raises(StartError, match=r"^the node cannot be drained: a$"):
            node_drain.drain_node(60.0, lambda _: None)
        assert drained.connected == 0


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
