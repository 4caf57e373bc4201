"""Every panel and every alert has data in a real Prometheus that scrapes a cluster under load.

`python -m tests.dashboards.test_prometheus` draws the pictures of docs/metrics.md from the same.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dashboards.__main__ import ROOT
from dashboards.alerts import ALERTS
from dashboards.draw import draw
from dashboards.panels import DASHBOARDS, FLEET, GROUP, ROUTER
from dashboards.prometheus import Prometheus, program, scraping
from kvmesh.cluster.lifecycle import Endpoint
from kvmesh.cluster.telemetry import table
from tests.cluster.e2e.harness import processes_named, serving, small_config, wait_for
from tests.dashboards.load import load
from tests.dashboards.promql import parse, selectors

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(program() is None, reason="needs Prometheus: apt install prometheus"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

# Two groups, one with the probe of its format; the first tenant has metrics.
CONFIG = small_config(
    groups=[{}, {"kv_format": "int4", "kv_probe": "warn"}],
    metrics={"tenants": 1},
    router={"max_queued": 6},
)
# What a healthy cluster without GPUs, of a model without experts, does not have; and quarantines,
# which it has if the engine dies within a step.
ABSENT = {
    metric.exported
    for metric in (
        table.EXPERT_IMBALANCE,
        table.GPU_UTILIZATION,
        table.GPU_MEMORY,
        table.PINNED_EVICTIONS,
        table.PREEMPTIONS,
        table.QUARANTINES,
    )
}
WINDOW_S = 120.0


@contextmanager
def observed(directory: Path) -> Iterator[tuple[Endpoint, Prometheus]]:
    """A cluster under load, and the Prometheus that scrapes it. A group's engine dies once."""
    keys, data = directory / "keys", directory / "data"
    keys.mkdir()
    data.mkdir()
    with serving(CONFIG, keys) as endpoint:
        assert endpoint.metrics_url is not None
        with scraping(endpoint.metrics_url, data) as server, load(endpoint):
            tokens = f"sum(increase({table.COMPLETION_TOKENS.exported}[30s])) > 0"
            wait_for(lambda: bool(server.ask(tokens, window_s=1)), "tokens are counted")
            (rank, *_) = processes_named("RankActor")
            os.kill(rank.pid, signal.SIGKILL)
            lost = f"sum({table.FAILOVERS.exported}) > 0"
            wait_for(lambda: bool(server.ask(lost, window_s=1)), "failovers are counted")
            yield endpoint, server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with observed(tmp_path_factory.mktemp("observed")) as (_, server):
        yield server


def has_data(server: Prometheus, expr: str) -> bool:
    return bool(server.ask(expr, window_s=WINDOW_S))


def test_every_panel_has_data(server: Prometheus) -> None:
    expected = {
        f"{dashboard.name}: {panel.title}": query.expr
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
        if not ABSENT & {series.name for series in selectors(parse(query.expr))}
    }
    assert len(expected) > 30

    def empty() -> list[str]:
        return [title for title, expr in expected.items() if not has_data(server, expr)]

    wait_for(lambda: not empty(), lambda: f"data for {empty()}", period_s=2)


def test_every_alert_is_about_series_that_exist(server: Prometheus) -> None:
    for alert in ALERTS:
        for series in selectors(parse(alert.expr)):
            assert has_data(server, series.name), f"{alert.name}: {series.name}"


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, observed(Path(directory)) as (_, server):
        time.sleep(WINDOW_S)
        for dashboard in (FLEET, GROUP, ROUTER):
            path = ROOT / f"docs/images/dashboard-{dashboard.name}.png"
            draw(dashboard, server, path, time.monotonic() - start)
            print(path)


if __name__ == "__main__":
    main()
