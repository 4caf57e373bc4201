"""One group, whose calls are traced if their callers' are."""

from __future__ import annotations

from kvmesh.cluster.config import ClusterConfig
from tests.cluster.e2e.harness import small_config

QUEUE_LIMIT = 24


def config(collector: str | None = None) -> ClusterConfig:
    return small_config(
        router={"max_queued": QUEUE_LIMIT},
        metrics={"tenants": 1},
        traces={"endpoint": collector, "sample_ratio": 0},
    )
