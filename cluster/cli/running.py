"""A cluster that a command starts, with its progress on the terminal, and stops at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvmesh.cluster.cli.console import Steps
from kvmesh.cluster.cli.signals import StopRequest
from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.lifecycle import Cluster, Endpoint


@contextlib.contextmanager
def running(config: ClusterConfig, stop: StopRequest) -> Iterator[tuple[Cluster, Endpoint]]:
    """Raises Stop at a signal while it starts; the second signal stops it without waiting."""
    steps = Steps()
    cluster = Cluster(config, steps)
    stop.on_repeat(cluster.hurry)
    with stop.interrupting():
        with steps:
            endpoint = cluster.start_guarded()
        try:
            yield cluster, endpoint
        finally:
            with Steps() as closing:
                cluster.report_to(closing)
                cluster.stop()
