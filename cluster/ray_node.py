"""Ray's own processes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.resources import logical_cpus


def start_node(config: ClusterConfig, directory: Path, gcs_port: int) -> Any:
    """Start a Ray cluster that is this node alone. Returns Ray's Node, which ends it again.

    As `ray.init` does, except for what serves nobody without `ray.dashboard`, and would take 170 MB
    and seconds of CPU at the start: the dashboard's process, of which only the reporter of usage
    statistics is left; the autoscaler's monitor, on a cluster that no node can join; and the log
    monitor, which copies logs to drivers that want them. `ray start` can leave out the last two.

    directory: for its files
    gcs_port: a free one. For one of the GCS's own choice Ray would wait until `timeouts.start_s` is
        over, deaf to signals, even if the GCS has died, which it notices here within a minute
    Raises what Ray does when it does not start.
    """
    # Late, because Ray reads the environment when it is imported.
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LocalNode(Node):
        def start_api_server(self, **options: Any) -> None:
            if config.ray.dashboard:
                super().start_api_server(**options)

    log_monitor: Any = config.ray.dashboard  # Ray's annotation says text
    ensure_token_if_auth_enabled(create_token_if_missing=False)
    params = RayParams(
        num_cpus=logical_cpus(config),
        object_store_memory=config.ray.object_store_bytes,
        include_dashboard=config.ray.dashboard,
        include_log_monitor=log_monitor,
        no_monitor=not config.ray.dashboard,
        temp_dir=str(directory),
        metrics_export_port=config.metrics.port,
        node_ip_address="127.0.0.1",
        gcs_server_port=gcs_port,
    )
    return LocalNode(params, head=True, shutdown_at_exit=False, ray_init_cluster=True)
