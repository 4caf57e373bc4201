"""Several Ray nodes on this machine: one is drained, another is lost, and no stream notices."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import pytest
import yaml

from kvmesh.client import Client, KVMeshError, Loads
from kvmesh.cluster.lifecycle import Endpoint
from kvmesh.cluster.ports import Port, take_ports
from tests.cluster.e2e.harness import (
    SMALL_ENGINE,
    check_accounts,
    greedy_by_engine,
    small_config,
    wait_for,
    wait_idle,
)
from tests.cluster.e2e.ray_nodes import (
    TOKEN,
    RayNodes,
    alive_nodes,
    application,
    deploy,
    deployable,
    nodes_of,
    ray_nodes,
)
from tests.cluster.e2e.streams import PATIENT, PROMPTS, Streams, check_complete
from tests.model.shallow import make_shallow, shallow_path

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(" " in sys.executable, reason="`ray start` fails below a path with spaces"),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

KEY = "a-key-of-a-test"
KVMESH = (sys.executable, "-c", "from kvmesh.cluster.cli.commands import app; app()")
GROUPS = 2
TOKENS = 40
STREAMS = 30


@dataclass
class Cluster:
    nodes: RayNodes
    endpoint: Endpoint

    def node_of(self, deployment: str) -> str:
        (node,) = nodes_of(application(self.nodes.url), deployment).values()
        return node

    def loads(self) -> Loads:
        with Client(self.endpoint.target, api_key=KEY, retry=PATIENT) as client:
            return client.loads()

    def healthy(self) -> set[str]:
        """Groups that are up, by name."""
        try:
            return {group.group for group in self.loads().groups if group.healthy}
        except KVMeshError:
            return set()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A worker has room for one group, and there is one worker more than groups.

    Proxies of several nodes would have the same ports here, so that there is one on the head alone.
    """
    make_shallow()
    ports = take_ports("127.0.0.1", {})
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as name:
        directory = Path(name)
        keys = directory / "keys" / "tenant.admin"
        keys.parent.mkdir()
        keys.write_text(f"{KEY}\n")
        keys.chmod(0o600)
        values = {
            "model": str(shallow_path()),
            "engine": dict(SMALL_ENGINE),
            "groups": GROUPS,
            "ingress": {
                "host": "127.0.0.1",
                "port": ports[Port.GRPC],
                "http_port": ports[Port.HTTP],
                "replicas": 2,
            },
            "auth": {"key_directory": str(keys.parent)},
            "timeouts": {"drain_s": 20},
        }
        with ray_nodes(directory, ports, values, 1, *[2] * (GROUPS + 1)) as nodes:
            config = {**deployable(values), "proxy_location": "HeadOnly"}
            (directory / "serve.yaml").write_text(yaml.safe_dump(config))
            deploy(nodes.url, directory / "serve.yaml")
            cluster = Cluster(nodes, Endpoint(f"127.0.0.1:{ports[Port.GRPC]}", "", KEY, None))
            wait_for(lambda: len(cluster.healthy()) == GROUPS, "every group is up")
            yield cluster
    ports.release()


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, tuple[int, ...]]:
    """The output for each prompt when nothing happens."""
    with Client(cluster.endpoint.target, api_key=KEY) as client:
        ids = [client.tokenize(prompt).token_ids for prompt in PROMPTS]
    answers = greedy_by_engine(small_config(), ids, TOKENS)
    return dict(zip(PROMPTS, answers, strict=True))


async def test_a_node_is_drained_under_streams(
    cluster: Cluster, expected: dict[str, tuple[int, ...]]
) -> None:
    """Its group ends what it has while another one of its name starts elsewhere."""
    node = cluster.node_of("engine-0")
    prompts = list(islice(cycle(PROMPTS), STREAMS))
    streams = Streams(cluster.endpoint, prompts, TOKENS)
    await streams.received(3)
    command = [*KVMESH, "drain-node", "--address", cluster.nodes.gcs, "--node-id", node]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with subprocess.Popen([*command, "--timeout", "240"], env=environment) as draining:
        check_complete(await streams.ends(), prompts, expected)
        assert draining.wait(300) == 0
    wait_for(lambda: len(cluster.healthy()) == GROUPS, "the group is up again")
    assert cluster.node_of("engine-0") != node
    with Client(cluster.endpoint.target, api_key=KEY, retry=PATIENT) as client:
        wait_idle(client)
        assert {group.group for group in client.loads().groups} == {"engine-0", "engine-1"}
        check_accounts(client.loads())
    # Ray ends a node that drains and is empty.
    wait_for(lambda: node not in alive_nodes(cluster.nodes.url), "the node is gone")


async def test_a_node_is_lost_under_streams(
    cluster: Cluster, expected: dict[str, tuple[int, ...]]
) -> None:
    """After the other test, because no node is left for its group."""
    node = cluster.node_of("engine-1")
    prompts = list(islice(cycle(PROMPTS), STREAMS))
    streams = Streams(cluster.endpoint, prompts, TOKENS)
    await streams.received(3)

    def all_run() -> bool:
        return all(group.running > 0 for group in cluster.loads().groups)

    await asyncio.to_thread(wait_for, all_run, "every group has streams")
    cluster.nodes.kill(node)
    streamed = await streams.ends()
    check_complete(streamed, prompts, expected)
    assert sum(seen.failovers + seen.resumes for seen in streamed) > 0
    with Client(cluster.endpoint.target, api_key=KEY, retry=PATIENT) as client:
        wait_idle(client)
    assert cluster.healthy() == {"engine-0"}
