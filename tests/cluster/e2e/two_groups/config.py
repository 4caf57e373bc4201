"""Two groups and two ingresses."""

from __future__ import annotations

from tests.cluster.e2e.harness import small_config

GROUPS = 2
TOKENS = 24  # of each greedy stream: what is resumed has sealed pages
CONFIG = small_config(
    groups=GROUPS,
    ingress={"port": 0, "http_port": 0, "replicas": 2},
    # Half a minute's load on an idle machine; on a busy one no request may be refused either.
    router={"report_period_s": 0.1, "max_queued": 200, "queue_timeout_s": 900.0},
)
