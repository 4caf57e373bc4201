"""The configuration of Ray Serve that deploys kvmesh: `serveConfigV2`, as Kubernetes calls it.

`kvmesh serve` submits it, `kvmesh config --serve` prints it, and the Helm chart renders it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.config_text import changed
from kvmesh.cluster.keys import with_local_key
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.settings import Settings

APP_NAME: Final = "kvmesh"
BUILDER: Final = "kvmesh.cluster.app:build"
SERVICER: Final = "kvmesh.cluster.grpc_front.add_to_server"
GRPC_PORT, HTTP_PORT = 9000, 8000  # where they are not chosen
# Of Serve, before a process drains, and then of the process, to hand over and to end its ranks.
STOP_S: Final = 20.0

AnySettings = TypeVar("AnySettings", bound=Settings)


def serve_config(config: ClusterConfig) -> dict[str, Any]:
    """What Serve has to run for these settings, complete, as plain values.

    config: with host and ports, see `for_nodes`, and valid everywhere, see `anywhere`
    Raises ConfigError naming `layout.mode` if no layout was chosen: the application sees no GPUs.
    """
    if config.layout.mode == "auto":
        raise ConfigError(
            "layout.mode",
            "is auto only for `kvmesh serve`; set groups, engine.tp and engine.kvp, which "
            "`kvmesh plan` recommends",
        )
    arguments: dict[str, Any] = changed(config)
    # They are for the program that starts a cluster; the application does not use them.
    arguments.pop("ray", None)
    arguments.get("metrics", {}).pop("port", None)
    application: dict[str, Any] = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": BUILDER,
        "args": arguments,
    }
    if config.autoscaling.min_groups is not None:
        # Serve then takes the router's word for how many replicas a group has.
        application["external_scaler_enabled"] = True
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.ingress.host, "port": config.ingress.http_port},
        # Serve's own reflection would answer callers without a key.
        "grpc_options": {
            "port": config.ingress.port,
            "grpc_servicer_functions": [SERVICER],
            "enable_reflection": False,
        },
        "applications": [application],
    }


def behind_proxy(config: ClusterConfig) -> ClusterConfig:
    """The settings of a cluster on one host, where only the proxy listens at `ingress.host`.

    It calls replicas at 127.0.0.1, and they listen at the address that Serve has.
    """
    ingress = config.ingress.model_copy(update={"host": "127.0.0.1"})
    return config.model_copy(update={"ingress": ingress})


def for_nodes(config: ClusterConfig) -> ClusterConfig:
    """The settings with the defaults of a cluster whose nodes are pods or other hosts.

    A proxy there listens on all interfaces and fixed ports: nobody could find any others.
    """
    host = config.ingress.host if "host" in config.ingress.model_fields_set else "0.0.0.0"
    ports = {"port": config.ingress.port or GRPC_PORT}
    ports["http_port"] = config.ingress.http_port or HTTP_PORT
    ingress = config.ingress.model_copy(update={"host": host, **ports})
    return config.model_copy(update={"ingress": ingress})


def anywhere(config: ClusterConfig, environ: Mapping[str, str]) -> ClusterConfig:
    """The settings as other processes can use them, wherever they run.

    Paths are absolute, and this machine's key, if one is needed, is there by its hash.
    Raises the errors of `with_local_key`.
    """
    groups = config.groups
    if isinstance(groups, tuple):
        groups = tuple(_with_absolute(group, "calibration") for group in groups)
    changes: dict[str, Any] = {
        "auth": _with_absolute(with_local_key(config.auth, environ), "key_directory"),
        "engine": _with_absolute(config.engine, "calibration"),
        "groups": groups,
    }
    if config.model != EMBEDDED_NAME and Path(os.path.expanduser(config.model)).exists():
        changes["model"] = _absolute(config.model)
    return config.model_copy(update=changes)


def _with_absolute(settings: AnySettings, name: str) -> AnySettings:
    """The settings with a path in them made absolute, if it is set."""
    path = getattr(settings, name)
    if path is None or name not in settings.model_fields_set:
        return settings
    return settings.model_copy(update={name: type(path)(_absolute(path))})


def _absolute(path: str | Path) -> str:
    return str(Path(os.path.expanduser(path)).absolute())
