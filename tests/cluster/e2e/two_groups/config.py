"""Two groups and two ingresses."""

from __future__ import annotations

from collections.abc import Callable

from tests.cluster.e2e.harness import KV_LAYER_BYTES, SMALL_ENGINE, small_config
from tests.model.shallow import LAYERS

# Greedy outputs of so many tokens, by their prompts, when nothing dies.
Outputs = Callable[[int], dict[str, tuple[int, ...]]]

GROUPS = 2
TOKENS = 64  # of each greedy stream: what is resumed has sealed pages
CONFIG = small_config(
    groups=GROUPS,
    # Room for a stream that outlives the start of a router.
    engine={**SMALL_ENGINE, "kv_memory_bytes": 3 * LAYERS * KV_LAYER_BYTES},
    ingress={"port": 0, "http_port": 0, "replicas": 2},
    # Half a minute's load on an idle machine; on a busy one no request may be refused either.
    router={"report_period_s": 0.1, "max_queued": 200, "queue_timeout_s": 900.0},
)
