"""How many replicas Serve runs of a deployment. Serve allows it to an application's own scaler."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID

from kvmesh.cluster.group_scaler import ScalingError

REPLICAS = "target_num_replicas"
CALL_TIMEOUT_S = 10.0


async def replicas_wanted(app_name: str) -> dict[str, int]:
    """By deployment, how many replicas Serve is to run; it keeps that when it restarts.

    Raises ScalingError.
    """
    details = await _answer(_controller().get_serve_instance_details.remote())
    application = details["applications"].get(app_name, {"deployments": {}})
    return {name: x[REPLICAS] for name, x in application["deployments"].items()}


async def set_replicas(app_name: str, deployment: str, count: int) -> None:
    """What Serve's REST API does at `/deployments/NAME/scale`. Raises ScalingError."""
    identity = DeploymentID(name=deployment, app_name=app_name)
    await _answer(_controller().update_deployment_replicas.remote(identity, count))


async def _answer(call: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return await call
    except TimeoutError:
        raise ScalingError("Serve's controller does not answer") from None
    except RayError as error:
        raise ScalingError(str(error)) from error


def _controller() -> Any:
    client = serve.context._get_global_client()
    assert client is not None, "it raises if Serve does not run"
    return client._controller
