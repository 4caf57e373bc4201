"""A Prometheus server of one's own that scrapes a cluster, to see whether dashboards have data.

Debian's package `prometheus` has the program.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dashboards.queries import RATE_INTERVAL

SCRAPE_S = 1
START_TIMEOUT_S = 60.0
# Four scrapes and one export of Ray's, at least.
INTERVAL = "30s"


@dataclass(frozen=True, slots=True)
class Series:
    """values: (Unix time, value), NaN left out"""

    labels: dict[str, str]
    values: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Prometheus:
    """Answers queries with Grafana's variables, for which it takes all values."""

    url: str

    def ask(self, expr: str, *, window_s: float, step_s: float = 1.0) -> list[Series]:
        """The series of an expression over the last `window_s` seconds. Raises HTTPError."""
        now = time.time()
        found = self._get(
            "query_range", query=_filled(expr), start=now - window_s, end=now, step=step_s
        )
        return [_series(x) for x in found["data"]["result"] if _series(x).values]

    def targets_up(self) -> bool:
        found = self._get("query", query="up")["data"]["result"]
        return bool(found) and all(x["value"][1] == "1" for x in found)

    def _get(self, what: str, **parameters: object) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{what}?{query}", timeout=30) as reply:
            return json.load(reply)


def program() -> str | None:
    """Where Prometheus is, None if it is not installed."""
    return shutil.which("prometheus")


@contextmanager
def scraping(metrics_url: str, directory: Path) -> Iterator[Prometheus]:
    """A server that keeps its data below an empty directory. Raises TimeoutError."""
    binary = program()
    assert binary is not None, "prometheus is not installed"
    parts = urllib.parse.urlsplit(metrics_url)
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s"},
        "scrape_configs": [
            {
                "job_name": "kvmesh",
                "metrics_path": parts.path,
                "static_configs": [{"targets": [parts.netloc]}],
            }
        ],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{_free_port()}"
    process = subprocess.Popen(
        [
            binary,
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=warn",
        ]
    )
    try:
        server = Prometheus(f"http://{address}")
        _wait_up(server)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def _wait_up(server: Prometheus) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if server.targets_up():
                return
        except (OSError, urllib.error.URLError):
            pass  # it does not listen yet
        if time.monotonic() > deadline:
            raise TimeoutError("Prometheus has not scraped the cluster")
        time.sleep(0.2)


def _filled(expr: str) -> str:
    expr = expr.replace(RATE_INTERVAL, INTERVAL)
    for name in ("cluster", "group", "tenant"):
        expr = expr.replace(f"${name}", ".*")
    return expr


def _series(found: dict[str, Any]) -> Series:
    values = ((float(at), float(value)) for at, value in found["values"])
    return Series(found["metric"], tuple((at, x) for at, x in values if x == x))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
