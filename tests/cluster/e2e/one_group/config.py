"""One group with the whole embedded model, whose calls are traced if their callers' are."""

from __future__ import annotations

from kvmesh.cluster.config import ClusterConfig
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from tests.cluster.e2e.harness import SMALL_ENGINE, small_config

QUEUE_LIMIT = 24


def config(collector: str | None = None) -> ClusterConfig:
    return small_config(
        model=EMBEDDED_NAME,
        engine={**SMALL_ENGINE, "kv_memory_bytes": "16MiB"},
        router={"max_queued": QUEUE_LIMIT, "queue_timeout_s": 900.0},
        metrics={"tenants": 1},
        traces={"endpoint": collector, "sample_ratio": 0},
    )
