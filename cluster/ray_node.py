"""Ray's own processes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.resources import logical_cpus


def start_node(config: ClusterConfig, directory: Path) -> Any:
    """Start a cluster of Ray with this node alone, and return its Node, which ends it.

    As `ray.init` does, but without `ray.dashboard` not with three processes that nothing uses then,
    each of which takes 80 MB and a second of CPU to start: of the dashboard there would be what
    reports usage statistics, of the autoscaler what has no nodes to add, and of the logs what
    copies them to this process. `ray start` has options to leave out two of these.

    directory: for its files
    Raises what Ray does when it does not start.
    """
    # Late, because Ray reads the environment when it is imported.
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LocalNode(Node):  # type: ignore[misc]  # it has no annotations
        def start_api_server(self, **options: Any) -> None:
            if config.ray.dashboard:
                super().start_api_server(**options)

    params = RayParams(
        num_cpus=logical_cpus(config),
        object_store_memory=config.ray.object_store_bytes,
        include_dashboard=config.ray.dashboard,
        include_log_monitor=config.ray.dashboard,
        no_monitor=not config.ray.dashboard,
        temp_dir=str(directory),
        metrics_export_port=config.metrics.port,
        node_ip_address="127.0.0.1",
    )
    return LocalNode(params, head=True, shutdown_at_exit=False, ray_init_cluster=True)
