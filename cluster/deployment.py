"""The application on a Ray cluster: submitting it, and what Serve says about it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvmesh.cluster.errors import StartError
from kvmesh.cluster.serve_config import APP_NAME

POLL_S = 0.2


def check_running(config: Mapping[str, Any]) -> None:
    """Raises StartError if Serve runs already, with other options: it ignores any that are given.

    config: a `serve_config`
    """
    from ray.exceptions import RayError
    from ray.serve.config import gRPCOptions
    from ray.serve.context import _get_global_client

    try:
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is None:
            return
        # Without those that are as by default.
        grpc = gRPCOptions(**client.get_serve_details()["grpc_options"])
    except (RayError, RuntimeError) as error:
        raise StartError(f"Serve does not answer: {_last_error(str(error))}") from error
    if different := _differences(config, client.http_config, grpc):
        raise StartError(
            f"Serve runs in this Ray cluster already, and {'; '.join(different)}: set what it has, "
            "or end it and all that it runs with `serve shutdown`"
        )


def _differences(config: Mapping[str, Any], http: Any, grpc: Any) -> list[str]:
    """What the application needs and a Serve with these options does not have, in words.

    http, grpc: HTTPOptions and gRPCOptions of Ray Serve
    """
    wanted_http, wanted_grpc = config["http_options"], config["grpc_options"]
    pairs = [
        ("ingress.host", http.host, wanted_http["host"]),
        ("ingress.http_port", http.port, wanted_http["port"]),
        ("ingress.port", grpc.port, wanted_grpc["port"]),
    ]
    different = [f"its {name} is {has}, not {wants}" for name, has, wants in pairs if has != wants]
    # It may have those of others as well.
    if not set(wanted_grpc["grpc_servicer_functions"]) <= set(grpc.grpc_servicer_functions):
        different.append("it does not serve kvmesh's gRPC calls")
    elif grpc.enable_reflection and not wanted_grpc["enable_reflection"]:
        different.append("its gRPC reflection answers callers without a key")
    return different


def submit(config: Mapping[str, Any]) -> None:
    """Start Serve unless it runs already, and have it run the application.

    config: a `serve_config`
    Raises StartError. Returns before the application is ready.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions, gRPCOptions

    _quieten_serve()
    try:
        serve.start(
            proxy_location=config["proxy_location"],
            http_options=HTTPOptions(**config["http_options"]),
            grpc_options=gRPCOptions(**config["grpc_options"]),
        )
        _apply(config, config["applications"])
    except (RayError, RuntimeError, TimeoutError, ValueError) as error:
        raise StartError(f"Serve did not start: {_last_error(str(error))}") from error
    _quieten_serve()


def withdraw(timeout_s: float, hurry: threading.Event) -> bool:
    """End the application, if Serve runs, and wait until its processes have ended.

    Returns whether they have: not once `hurry` is set, nor after `timeout_s`.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return True
    # First by the configuration, or Serve would start it again when its controller recovers.
    _apply({}, [])
    # Without its wait, which nothing ends before a minute, and which is shorter than a drain.
    client.delete_apps([APP_NAME], blocking=False)
    deadline = time.monotonic() + timeout_s
    while client.get_serve_status(APP_NAME).app_status.status != "NOT_STARTED":
        if time.monotonic() > deadline or hurry.wait(POLL_S):
            return False
    return True


def _apply(config: Mapping[str, Any], applications: Sequence[Mapping[str, Any]]) -> None:
    """Have Serve run these applications, and those of others.

    config: the rest of what Serve is given
    """
    # A program has no other way to what Ray's dashboard does with a configuration.
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    client = _get_global_client()
    assert client is not None, "it raises if Serve does not run"
    everything = [*applications, *_others(client.get_serve_details())]
    client.deploy_apps(ServeDeploySchema.model_validate({**config, "applications": everything}))


def _others(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other applications that were deployed from a configuration: one without them ends them.

    details: of Serve's state
    """
    others = [
        application["deployed_app_config"]
        for name, application in details["applications"].items()
        if name != APP_NAME and application["source"] == "declarative"
    ]
    # One that is being deleted has none any more.
    return [config for config in others if config is not None]


def waiting_for() -> str | None:
    """What the application waits for, for users; None once all deployments are healthy.

    Raises StartError when Serve has given up.
    """
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        # serve.status() costs 0.1 s of CPU here, and half of that in Serve's controller.
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is None:
            return "waiting for Serve"
        status = client.get_serve_status(APP_NAME)
    except (RayError, RayServeException) as error:
        raise StartError(f"Serve has stopped: {error}") from error
    application, deployments = status.app_status, status.deployment_statuses
    if application.status == "DEPLOY_FAILED":
        for deployment in deployments:
            if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY") and deployment.message:
                raise StartError(
                    f"{deployment.name} did not start: {_last_error(deployment.message)}"
                )
        raise StartError(f"the application did not start: {_last_error(application.message)}")
    if application.status == "RUNNING":
        return None
    unready = sorted(x.name for x in deployments if x.status != "HEALTHY")
    if unready:
        return f"waiting for {', '.join(unready)}"
    return "almost ready" if deployments else "waiting for Serve"


def _last_error(trace: str) -> str:
    """The last line of a traceback that names an error."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no reason was given"])[-1]


def _quieten_serve() -> None:
    """Hide what Serve logs here: errors that matter are raised, or in its status."""
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
