"""Blocks of ports: nobody else's, free again when their owner has ended."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from kvmesh.cluster import ports
from kvmesh.cluster.ports import Port, take_ports
from kvmesh.workers.errors import ConfigError

# Apart from the ports of clusters that run meanwhile, and of other runs of these tests.
BLOCK_SIZE = 40
FIRST_PORT = 10_000 + os.getpid() % 20 * 480
END_PORT = FIRST_PORT + 480
HOLD = f"""
import sys
from kvmesh.cluster import ports
from kvmesh.cluster.ports import take_ports
ports.FIRST_PORT, ports.END_PORT, ports.BLOCK_SIZE = {FIRST_PORT}, {END_PORT}, {BLOCK_SIZE}
block = take_ports("127.0.0.1", {{}})
print(block.first, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "FIRST_PORT", FIRST_PORT)
    monkeypatch.setattr(ports, "END_PORT", END_PORT)
    monkeypatch.setattr(ports, "BLOCK_SIZE", BLOCK_SIZE)


def test_blocks_of_processes_that_start_together_do_not_overlap() -> None:
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        firsts = [int(holder.stdout.readline()) for holder in holders if holder.stdout]
        own = take_ports("127.0.0.1", {})
        own.release()
        assert len({*firsts, own.first}) == len(holders) + 1
        assert all((first - ports.FIRST_PORT) % BLOCK_SIZE == 0 for first in firsts)
        # No trace is left of an owner that is killed.
        holders[0].kill()
        holders[0].wait()
        again = take_ports("127.0.0.1", {})
        again.release()
        assert again.first == min(firsts[0], own.first)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            for pipe in (holder.stdin, holder.stdout):
                assert pipe is not None
                pipe.close()


def test_a_block_with_a_port_in_use_is_skipped() -> None:
    first = take_ports("127.0.0.1", {})
    first.release()
    with socket.socket() as other:
        # As Ray Serve's replicas: it would share the port with any other that does the same.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", first.grpc_replicas[3]))
        other.listen()
        second = take_ports("127.0.0.1", {})
        second.release()
    assert second.first > first.first


def test_parts_of_a_block_are_disjoint() -> None:
    block = take_ports("127.0.0.1", {})
    block.release()
    singles = [block[port] for port in Port]
    everything = [*singles, *block.http_replicas, *block.grpc_replicas]
    assert sorted(everything) == list(range(block.first, block.first + BLOCK_SIZE))


def test_a_chosen_port_belongs_to_one_cluster_before_it_is_bound() -> None:
    port = FIRST_PORT - 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        with pytest.raises(ConfigError, match=f"{port} is in use"):
            take_ports("127.0.0.1", {"ingress.port": port})
    block = take_ports("127.0.0.1", {"ingress.port": port})
    with pytest.raises(ConfigError) as caught:
        take_ports("127.0.0.1", {"metrics.port": port})
    assert caught.value.field == "metrics.port"
    block.release()
    take_ports("127.0.0.1", {"ingress.port": port}).release()


def test_a_chosen_port_is_in_nobodys_block() -> None:
    """Neither in that of the cluster it is chosen for, nor in one that is taken later."""
    own = take_ports("127.0.0.1", {})
    own.release()
    ports = {"ingress.port": own[Port.PROXY_STATS], "metrics.port": own.grpc_replicas[-1]}
    chosen = take_ports("127.0.0.1", ports)
    other = take_ports("127.0.0.1", {})
    assert own.first < chosen.first < other.first
    other.release()
    chosen.release()
    again = take_ports("127.0.0.1", {})
    again.release()
    assert again.first == own.first


def test_a_port_of_another_clusters_block_cannot_be_chosen() -> None:
    other = take_ports("127.0.0.1", {})
    for port in (other[Port.PROXY_STATS], other.http_replicas[2], other.grpc_replicas[-1]):
        with pytest.raises(ConfigError, match=f"{port} is in use") as caught:
            take_ports("127.0.0.1", {"ingress.http_port": port})
        assert caught.value.field == "ingress.http_port"
    other.release()
    take_ports("127.0.0.1", {"ingress.http_port": other[Port.PROXY_STATS]}).release()


def test_clusters_can_choose_neighbouring_ports() -> None:
    one = take_ports("127.0.0.1", {"ingress.port": FIRST_PORT})
    two = take_ports("127.0.0.1", {"ingress.port": FIRST_PORT + 1})
    assert one.first != two.first
    one.release()
    two.release()


def test_ports_that_could_not_be_taken_together_are_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, taken = FIRST_PORT, FIRST_PORT + 1
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        with pytest.raises(ConfigError) as in_use:
            take_ports("127.0.0.1", {"ingress.port": free, "metrics.port": taken})
    assert in_use.value.field == "metrics.port"
    with monkeypatch.context() as full:
        full.setattr(ports, "END_PORT", ports.FIRST_PORT)
        with pytest.raises(ConfigError) as too_many:  # it keeps the locks' last references
            take_ports("127.0.0.1", {"ingress.port": free, "metrics.port": taken})
    assert too_many.value.field == "ingress.port"
    take_ports("127.0.0.1", {"ingress.port": free, "metrics.port": taken}).release()


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b"])
@pytest.mark.parametrize("chosen", [{}, {"ingress.port": FIRST_PORT}])
def test_a_host_of_another_machine_is_refused_as_such(host: str, chosen: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen at {host}: .* name") as caught:
        take_ports(host, chosen)
    assert caught.value.field == "ingress.host"


class Unprivileged(socket.socket):
    """Of a user who may not bind ports below 1024."""

    def bind(self, address: Any) -> None:
        if self.family == socket.AF_INET and 0 < address[1] < 1024:
            raise PermissionError(errno.EACCES, "Permission denied")
        super().bind(address)


def test_a_privileged_port_is_refused_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Unprivileged)
    with pytest.raises(ConfigError, match="cannot listen on 443: Permission denied") as caught:
        take_ports("127.0.0.1", {"ingress.http_port": 443})
    assert caught.value.field == "ingress.http_port"


def test_too_many_clusters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "END_PORT", ports.FIRST_PORT)
    with pytest.raises(ConfigError, match="consecutive ports"):
        take_ports("127.0.0.1", {})
