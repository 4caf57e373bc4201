"""How many replicas Serve runs of a deployment. Serve allows it to an application's own scaler."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID

from kvmesh.cluster.group_scaler import ScalingError

REPLICAS = "target_num_replicas"


async def replicas_wanted(app_name: str) -> dict[str, int]:
    """By deployment, how many replicas Serve is to run; it keeps that when it restarts.

    Raises ScalingError.
    """
    try:
        details = await _controller().get_serve_instance_details.remote()
    except RayError as error:
        raise ScalingError(str(error)) from error
    application = details["applications"].get(app_name, {"deployments": {}})
    return {name: x[REPLICAS] for name, x in application["deployments"].items()}


async def set_replicas(app_name: str, deployment: str, count: int) -> None:
    """What Serve's REST API does at `/deployments/NAME/scale`. Raises ScalingError."""
    try:
        await _controller().update_deployment_replicas.remote(
            DeploymentID(name=deployment, app_name=app_name), count
        )
    except RayError as error:
        raise ScalingError(str(error)) from error


def _controller() -> Any:
    client = serve.context._get_global_client()
    assert client is not None, "it raises if Serve does not run"
    return client._controller
