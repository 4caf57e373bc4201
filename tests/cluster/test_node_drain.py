"""What is left on a node that is drained, by Serve's own account."""

from __future__ import annotations

from typing import Any

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
