"""What `kvmesh config --serve` prints, deployed as Kubernetes deploys it: by Ray's REST API."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvmesh.client import AuthenticationError, Client
from kvmesh.cluster.ports import Port, take_ports
from tests.cluster.e2e.harness import PATIENCE_S, SMALL_ENGINE, wait_for
from tests.cluster.e2e.ray_nodes import (
    TOKEN,
    RayNodes,
    answers,
    application,
    applications,
    deploy,
    nodes_of,
    ray_nodes,
)
from tests.model.shallow import make_shallow, shallow_path

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(" " in sys.executable, reason="`ray start` fails below a path with spaces"),
]

KEY, NEXT_KEY = "a-key-of-a-test", "its-next-key"
KVMESH = (sys.executable, "-c", "from kvmesh.cluster.cli.commands import app; app()")


@dataclass(frozen=True)
class RayHead:
    """A Ray cluster, and kvmesh's settings for it in `file`. key: the file with the API key"""

    nodes: RayNodes
    values: dict[str, Any]
    file: Path
    key: Path

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.values['ingress']['port']}"


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """With a key in a file, as in a mounted Secret."""
    make_shallow()
    ports = take_ports("127.0.0.1", {})
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as name:
        directory = Path(name)
        key = directory / "keys" / "tenant.admin"
        key.parent.mkdir()
        key.write_text(f"{KEY}\n")
        key.chmod(0o600)
        values = {
            "model": str(shallow_path()),
            "engine": dict(SMALL_ENGINE),
            "ingress": {
                "host": "127.0.0.1",
                "port": ports[Port.GRPC],
                "http_port": ports[Port.HTTP],
            },
            "auth": {"key_directory": str(key.parent)},
            "timeouts": {"drain_s": 5},
        }
        file = directory / "kvmesh.yaml"
        file.write_text(yaml.safe_dump(values))
        with ray_nodes(directory, ports, values, 4) as nodes:
            yield RayHead(nodes, values, file, key)
    ports.release()


def test_serve_joins_a_cluster_with_its_token_and_says_so_without(
    head: RayHead, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    serve = [*KVMESH, "serve", f"--address={head.nodes.gcs}", f"--config={head.file}"]

    def environment(**variables: str) -> dict[str, str]:
        cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        base = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_CACHE_HOME": cache}
        return base | {"PYTHONPATH": os.pathsep.join(sys.path), **variables}

    for wrong in ({}, {"RAY_AUTH_TOKEN": "another-token-of-a-test"}):
        said = subprocess.run(
            serve,
            env=environment(**wrong),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        ).stderr
        assert said.count("error: the Ray cluster at") == 1
        assert "asks for another token" in said and "InvalidAuthToken" not in said
    right = environment(RAY_AUTH_TOKEN_PATH=str(token))
    with subprocess.Popen(serve, env=right, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        target = process.stdout.readline().split()[-1]
        with Client(target, api_key=KEY) as client:
            answer = client.generate("The capital of France is", max_tokens=4, ignore_eos=True)
            assert answer.usage.completion_tokens == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert "kvmesh" not in applications(head.nodes.url)


def test_what_config_prints_is_deployed_by_rest_and_answers(head: RayHead, tmp_path: Path) -> None:
    """Its key is replaced while it runs. It stays deployed, so this test is the last one."""
    printed = subprocess.run(
        [*KVMESH, "config", "--serve", "--config", str(head.file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    file = tmp_path / "serve.yaml"
    file.write_text(printed)
    assert KEY not in printed
    url = head.nodes.url
    deploy(url, file)
    with Client(head.target, api_key=KEY) as client:
        wait_for(lambda: bool(client.groups()), "a group is up")
        answer = client.generate("The capital of France is", max_tokens=4, ignore_eos=True)
        assert answer.usage.completion_tokens == 4
        head.key.write_text(f"{NEXT_KEY}\n")
        wait_for(lambda: refuses(client), "the former key is refused")
    with Client(head.target, api_key=NEXT_KEY) as client:
        assert client.generate("x", max_tokens=1).usage.completion_tokens == 1
    assert answers(f"http://127.0.0.1:{head.values['ingress']['http_port']}/-/healthz")
    before = application(url)
    deploy(url, file)
    for deployment in ("router", "engine-0", "ingress"):
        assert nodes_of(before, deployment) == nodes_of(application(url), deployment), (
            "the same configuration changes nothing"
        )


def refuses(client: Client) -> bool:
    try:
        client.generate("x", max_tokens=1)
    except AuthenticationError:
        return True
    return False
