"""Clusters that share a host: what listens, and that nobody answers another's calls.

Clients of the second come from all interfaces.
"""

from __future__ import annotations

import fnmatch
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest

from kvmesh.client import NO_RETRY, AsyncClient, Client, UnavailableError
from kvmesh.cluster.lifecycle import Endpoint
from kvmesh.cluster.ports import BLOCK_SIZE, FIRST_PORT, Port
from tests.cluster.e2e.harness import PATIENCE_S, wait_for
from tests.cluster.e2e.ray_nodes import node_address
from tests.cluster.e2e.server import Server, serving_process

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="finding its processes needs Linux"),
]

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "security.md"
HOSTS = ("127.0.0.1", "0.0.0.0")
CALLS = 50  # of each
LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1", "::1")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """Started together, each with a key of its own."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serving_process(host)) for host in HOSTS]
        yield servers
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait_ended()


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the document's table. process: patterns of process names"""

    process: tuple[str, ...]
    port: str
    interface: str

    def fits(self, listener: Listener, host: str) -> bool:
        """host: `ingress.host`"""
        return (
            any(fnmatch.fnmatch(listener.process, pattern) for pattern in self.process)
            and self._has_port(listener)
            and self._has_address(listener.address, host)
        )

    def _has_address(self, address: str, host: str) -> bool:
        if self.interface == "ingress.host":
            return address == host
        return self.interface == "all" or address in LOOPBACK

    def _has_port(self, listener: Listener) -> bool:
        if self.port == "any":
            return listener.offset is None
        if self.port in SINGLE:
            return listener.offset == SINGLE[self.port]
        bounds = [int(number) for number in re.findall(r"\d+", self.port)]
        return listener.offset is not None and bounds[0] <= listener.offset <= bounds[-1]


# Of ports that the configuration leaves to the server.
SINGLE = {"ingress.port": Port.GRPC, "ingress.http_port": Port.HTTP, "metrics.port": Port.METRICS}


@dataclass(frozen=True, slots=True)
class Listener:
    """offset: within the cluster's block of ports; None outside it"""

    process: str
    address: str
    port: int
    offset: int | None


def documented() -> list[Row]:
    rows = []
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0] not in ("process", "---"):
            rows.append(Row(tuple(cells[0].split(", ")), cells[1], cells[2]))
    return rows


def listeners(server: Server) -> list[Listener]:
    endpoint = server.endpoint()
    port = int(endpoint.target.rsplit(":", 1)[1])
    first = port - (port - FIRST_PORT) % BLOCK_SIZE
    main = psutil.Process(server.process.pid)
    found = []
    for process in (main, *main.children(recursive=True)):
        # Ray adds the method that an actor runs at the moment.
        name = "kvmesh" if process == main else process.name().partition(".")[0]
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                address, port = connection.laddr
                offset = port - first
                inside = offset if 0 <= offset < BLOCK_SIZE else None
                found.append(Listener(name, address, port, inside))
    return found


def test_listeners_are_those_of_the_document(servers: list[Server]) -> None:
    rows = documented()
    assert len(rows) > 10
    for server, host in zip(servers, HOSTS, strict=True):
        found = listeners(server)
        unlisted = [x for x in found if not any(row.fits(x, host) for row in rows)]
        assert not unlisted, "not in docs/security.md, or on more interfaces"
        gone = [row for row in rows if not any(row.fits(x, host) for x in found)]
        assert not gone, "in docs/security.md, but not there"


def test_clients_of_other_hosts_are_served_where_it_was_asked_for(servers: list[Server]) -> None:
    other = node_address()
    for server, host in zip(servers, HOSTS, strict=True):
        endpoint = server.endpoint()
        target = endpoint.target.replace("127.0.0.1", other)
        url = endpoint.http_url.replace("127.0.0.1", other)
        with Client(target, api_key=endpoint.api_key, retry=NO_RETRY) as client:
            if host == "0.0.0.0":
                assert client.generate([1, 2, 3], max_tokens=1).usage.completion_tokens == 1
                assert urlopen(f"{url}/health", timeout=PATIENCE_S).status == 200
            else:
                with pytest.raises(UnavailableError):
                    client.generate([1, 2, 3], max_tokens=1)
                with pytest.raises(URLError, match="refused"):
                    urlopen(f"{url}/health", timeout=PATIENCE_S)


def test_ray_runs_no_process_that_serves_only_its_dashboard(servers: list[Server]) -> None:
    main = psutil.Process(servers[0].process.pid)
    commands = [" ".join(process.cmdline()) for process in main.children(recursive=True)]
    assert any("/gcs_server" in command for command in commands)
    for program in ("dashboard/dashboard.py", "/monitor.py", "/log_monitor.py"):
        assert not any(program in command for command in commands), program


def test_a_rank_on_a_cpu_has_not_loaded_triton(servers: list[Server]) -> None:
    main = psutil.Process(servers[0].process.pid)
    ranks = [x for x in main.children(recursive=True) if x.name().startswith("ray::RankActor")]
    libraries = {Path(found.path).name for rank in ranks for found in rank.memory_maps()}
    assert "libtorch_cpu.so" in libraries
    assert "libtriton.so" not in libraries


async def test_every_call_reaches_its_own_cluster(servers: list[Server]) -> None:
    endpoints = [server.endpoint() for server in servers]
    assert len({endpoint.api_key for endpoint in endpoints}) == len(HOSTS)
    for endpoint in endpoints:
        assert await answered(endpoint, CALLS) == CALLS


def test_a_replaced_ingress_is_not_a_neighbours(servers: list[Server]) -> None:
    """Another cluster would refuse the key, and no retry would hide that."""
    for server in servers:
        main = psutil.Process(server.process.pid)
        for process in main.children(recursive=True):
            if process.name().startswith("ray::ServeReplica:kvmesh:ingress"):
                process.send_signal(signal.SIGKILL)
    for server in servers:
        endpoint = server.endpoint()
        with Client(endpoint.target, api_key=endpoint.api_key, retry=NO_RETRY) as client:
            wait_for(partial(generates, client), "an answer from its own ingress")


def generates(client: Client) -> bool:
    try:
        client.generate([1, 2, 3], max_tokens=1, timeout_s=PATIENCE_S)
    except UnavailableError:
        return False
    return True


async def answered(endpoint: Endpoint, calls: int) -> int:
    """How many calls were answered, each over a connection of its own."""
    count = 0
    for _ in range(calls):
        async with AsyncClient(endpoint.target, api_key=endpoint.api_key, retry=NO_RETRY) as client:
            completion = await client.generate([1, 2, 3], max_tokens=1)
            count += len(completion.choices[0].token_ids)
    return count
