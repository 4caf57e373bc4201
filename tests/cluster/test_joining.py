"""Joining a Ray cluster that is not there: one line, without waiting for Ray."""

from __future__ import annotations

import builtins
import os
import socket
import subprocess
import sys

import pytest
import typer

from kvmesh.cluster import joining
from kvmesh.cluster.cli.exits import friendly_errors
from kvmesh.cluster.errors import StartError
from kvmesh.cluster.joining import join_ray

TOKEN = "the Ray cluster at {} asks for another token: copy ~/.ray/auth_token"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no.such.host.invalid"])
def test_nothing_listens_there(host: str) -> None:
    with pytest.raises(StartError, match=rf"no Ray cluster is at {host}:\d+: ") as caught:
        join_ray(f"{host}:{free_port()}")
    assert "\n" not in str(caught.value)


def test_no_cluster_on_this_machine() -> None:
    """In a process of its own, as the tests' must not import Ray.

    Ray looks for one among all processes of the machine, and here finds none, whatever runs there.
    """
    program = (
        "from ray._private import services; services._find_address_from_flag = lambda _: set();"
        "from kvmesh.cluster.joining import join_ray; join_ray('auto')"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": "/nonexistent", "RAY_TMPDIR": "/nonexistent",
             "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert (
        found.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "kvmesh.cluster.errors.StartError: no Ray cluster runs on this machine: start one with"
        )
    )


@pytest.mark.parametrize(
    ("kind", "words", "written", "address", "problem"),
    [
        ("ConnectionError", "lost", b"InvalidAuthToken", "ray://h", TOKEN.format("ray://h")),
        ("ConnectionError", "lost", b"InvalidAuthToken", "auto", TOKEN.format("auto")),
        ("RuntimeError", "lost", b"x: InvalidAuthToken: y\n", "h", TOKEN.format("h")),
        ("AuthenticationError", "no", b"", "h", TOKEN.format("h")),
        ("ConnectionError", "lost", b"another line", "auto", "no Ray cluster runs on this machine"),
        ("ConnectionError", "lost", b"", "h", "cannot join the Ray cluster at h: lost"),
        ("RuntimeError", "a\n b", b"", "auto", "cannot join the Ray cluster at auto: a b"),
        ("RayError", "died", b"", "h", "cannot join the Ray cluster at h: died"),
        ("ValueError", "bad", b"", "h", "cannot join the Ray cluster at h: bad"),
    ],
)
def test_what_ray_says_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    words: str,
    written: bytes,
    address: str,
    problem: str,
) -> None:
    """Of a wrong token, only what Ray has written to stderr tells."""
    import ray
    from ray import exceptions

    cause = getattr(exceptions, kind, None) or getattr(builtins, kind)

    def init(*_: object, **__: object) -> None:
        os.write(2, written)
        raise cause(words)

    monkeypatch.setattr(joining, "use_ray_token", lambda _: None)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(StartError) as caught:
        join_ray(address)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


def test_an_address_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich would make one of its emoji of `:1234:`."""
    with pytest.raises(typer.Exit), friendly_errors():
        raise StartError("no Ray cluster is at 127.0.0.1:1234: connection refused")
    assert "at 127.0.0.1:1234: connection" in capsys.readouterr().err
