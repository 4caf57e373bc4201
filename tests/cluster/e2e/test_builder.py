"""What `kvmesh config --serve` prints, deployed as Kubernetes deploys it: by Ray's REST API."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvmesh.client import AuthenticationError, Client
from kvmesh.cluster.ports import PortBlock, take_ports
from tests.cluster.e2e.harness import SMALL_ENGINE, wait_for
from tests.cluster.e2e.ray_nodes import (
    TOKEN,
    answers,
    application,
    applications,
    deploy,
    nodes_of,
    ray_nodes,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(" " in sys.executable, reason="`ray start` fails below a path with spaces"),
]

KEY, NEXT_KEY = "a-key-of-a-test", "its-next-key"
KVMESH = (sys.executable, "-c", "from kvmesh.cluster.cli.commands import app; app()")


def settings(directory: Path, ports: PortBlock) -> dict[str, Any]:
    """With a key in a file, as in a mounted Secret."""
    keys = directory / "keys" / "tenant.admin"
    keys.parent.mkdir()
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    return {
        "engine": dict(SMALL_ENGINE),
        "ingress": {"host": "127.0.0.1", "port": ports.single(4), "http_port": ports.single(5)},
        "auth": {"key_directory": str(directory / "keys")},
        "timeouts": {"drain_s": 5},
    }


def test_what_config_prints_is_deployed_by_rest_and_answers() -> None:
    """Its key is replaced while it runs."""
    ports = take_ports("127.0.0.1", {})
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as name:
        directory = Path(name)
        values = settings(directory, ports)
        (directory / "kvmesh.yaml").write_text(yaml.safe_dump(values))
        printed = subprocess.run(
            [*KVMESH, "config", "--serve", "--config", str(directory / "kvmesh.yaml")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        file = directory / "serve.yaml"
        file.write_text(printed)
        assert KEY not in printed
        with ray_nodes(directory, ports, values, 4) as nodes:
            url = nodes.url
            deploy(url, file)
            target = f"127.0.0.1:{values['ingress']['port']}"
            with Client(target, api_key=KEY) as client:
                wait_for(lambda: bool(client.groups()), "a group is up")
                answer = client.generate("The capital of France is", max_tokens=4, temperature=0.0)
                assert "Paris" in answer.text
                (directory / "keys" / "tenant.admin").write_text(f"{NEXT_KEY}\n")
                wait_for(lambda: refuses(client), "the former key is refused")
            with Client(target, api_key=NEXT_KEY) as client:
                assert client.generate("x", max_tokens=1).usage.completion_tokens == 1
            assert answers(f"http://127.0.0.1:{values['ingress']['http_port']}/-/healthz")
            before = application(url)
            deploy(url, file)
            for deployment in ("router", "engine-0", "ingress"):
                assert nodes_of(before, deployment) == nodes_of(application(url), deployment), (
                    "the same configuration changes nothing"
                )
    ports.release()


def refuses(client: Client) -> bool:
    try:
        client.generate("x", max_tokens=1)
    except AuthenticationError:
        return True
    return False


def test_serve_joins_a_cluster_with_its_token_and_says_so_without() -> None:
    ports = take_ports("127.0.0.1", {})
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as name:
        directory = Path(name)
        values = settings(directory, ports)
        file = directory / "kvmesh.yaml"
        file.write_text(yaml.safe_dump(values))
        token = directory / "token"
        token.write_text(TOKEN)
        with ray_nodes(directory, ports, values, 4) as nodes:
            serve = [*KVMESH, "serve", f"--address={nodes.gcs}", f"--config={file}"]

            def environment(**variables: str) -> dict[str, str]:
                cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
                base = {"PATH": os.environ["PATH"], "HOME": name, "XDG_CACHE_HOME": cache}
                return base | {"PYTHONPATH": os.pathsep.join(sys.path), **variables}

            for wrong in ({}, {"RAY_AUTH_TOKEN": "another-token-of-a-test"}):
                said = subprocess.run(
                    serve,
                    env=environment(**wrong),
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=120,
                ).stderr
                assert said.count("error: the Ray cluster at") == 1
                assert "asks for another token" in said and "InvalidAuthToken" not in said
            right = environment(RAY_AUTH_TOKEN_PATH=str(token))
            with subprocess.Popen(serve, env=right, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                target = process.stdout.readline().split()[-1]
                with Client(target, api_key=KEY) as client:
                    answer = client.generate("The capital of France is", max_tokens=4)
                    assert answer.usage.completion_tokens == 4
                process.send_signal(signal.SIGTERM)
                assert process.wait(90) == 0
            assert "kvmesh" not in applications(nodes.url)
    ports.release()
