"""Which key is sent to which server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmesh import Client, CredentialsError
from kvmesh.client.credentials import is_local, key_path, read_key_file, resolve_api_key
from kvmesh.protos import pb
from tests.client.servicer import ScriptedServicer, answering, serving


@pytest.fixture
def key_file() -> Path:
    path = key_path(os.environ)
    path.parent.mkdir(parents=True)
    path.write_text("file-key\n")
    path.chmod(0o600)
    return path


def sent_authorization(**options: str) -> object:
    servicer = ScriptedServicer(answering(pb.GetTenantLoadsResponse()))
    with serving(servicer) as target, Client(target, **options) as client:  # type: ignore[arg-type]
        client.tenant_loads()
    return servicer.metadata[0].get("authorization")


def test_the_argument_comes_first_then_the_environment_then_the_file(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sent_authorization() == "Bearer file-key"
    monkeypatch.setenv("KVMESH_API_KEY", "environment-key")
    assert sent_authorization() == "Bearer environment-key"
    assert sent_authorization(api_key="argument-key") == "Bearer argument-key"
    assert sent_authorization(api_key="") is None


def test_without_any_key_none_is_sent() -> None:
    assert sent_authorization() is None


def test_the_target_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    servicer = ScriptedServicer(answering(pb.GetTenantLoadsResponse()))
    with serving(servicer) as target:
        monkeypatch.setenv("KVMESH_TARGET", target)
        with Client() as client:
            client.tenant_loads()
    assert len(servicer.requests) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o777])
def test_a_file_open_to_others_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(CredentialsError, match=f"chmod 600 {key_file}"):
        Client("localhost:1")


def test_the_key_in_the_file_is_not_sent_to_other_machines(key_file: Path) -> None:
    assert resolve_api_key(None, "localhost:9000", os.environ) == "file-key"
    assert resolve_api_key(None, "kvmesh.example.com:443", os.environ) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"\xff\xfe", "schlüssel".encode()])
def test_a_file_without_a_key_is_refused(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    with pytest.raises(CredentialsError, match="printable ASCII"):
        read_key_file(key_file)


@pytest.mark.parametrize("key", ["line\nbreak", "tab\t", "é", "x" * 5000])
def test_a_key_that_is_invalid_in_a_header_is_refused(key: str) -> None:
    with pytest.raises(CredentialsError, match="api_key") as caught:
        Client("localhost:1", api_key=key)
    assert key not in str(caught.value)


def test_a_folder_instead_of_the_key_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="cannot read"):
        read_key_file(tmp_path)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_CONFIG_HOME": "/etc/xdg"}, Path("/etc/xdg/kvmesh/api_key")),
        ({"XDG_CONFIG_HOME": "relative"}, Path.home() / ".config/kvmesh/api_key"),
        ({}, Path.home() / ".config/kvmesh/api_key"),
    ],
)
def test_the_path_of_the_key_file(environ: dict[str, str], expected: Path) -> None:
    assert key_path(environ) == expected


@pytest.mark.parametrize(
    "target",
    ["localhost:9000", "LOCALHOST:1", "127.0.0.1:9000", "127.9.9.9:1", "[::1]:9000", "::1",
     "unix:/run/kvmesh.sock", "dns:localhost:9000", "dns:///localhost:9000",
     "ipv4:127.0.0.1:9000", "ipv6:[::1]:9000"],
)  # fmt: skip
def test_targets_on_this_machine(target: str) -> None:
    assert is_local(target)


@pytest.mark.parametrize(
    "target",
    ["example.com:9000", "10.0.0.1:9000", "localhost.example.com:1", "[2001:db8::1]:9000",
     "dns:///example.com:443", "dns://127.0.0.1/example.com:443", "ipv4:192.0.2.1:80",
     "xds:///localhost", "", "127.0.0.1.example.com:1", "ipv4:10.0.0.1:1,127.0.0.1:1"],
)  # fmt: skip
def test_targets_elsewhere(target: str) -> None:
    assert not is_local(target)
