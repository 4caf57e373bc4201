"""Joining a Ray cluster that is already running."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from kvmesh.cluster.errors import StartError
from kvmesh.cluster.keys import use_ray_token
from kvmesh.cluster.local_ray import own_sigterm

CONNECT_TIMEOUT_S = 10.0
# Ray's C++ part writes it to stderr once a second; Python then sees a lost connection.
_REFUSED = b"InvalidAuthToken"


def join_ray(address: str) -> Any:
    """Connect this process to the cluster at `address`, or to this host's for `auto`.

    Returns what `ray.init` does.

    Raises StartError, in one line, also if the cluster asks for a token that is not here.
    """
    use_ray_token(os.environ)
    _check_listens(address)
    import ray
    from ray.exceptions import AuthenticationError, RayError

    with _captured_stderr() as written, own_sigterm():
        try:
            return ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            written.seek(0)
            if isinstance(error, AuthenticationError) or _REFUSED in written.read():
                raise StartError(
                    f"the Ray cluster at {address} asks for another token: copy ~/.ray/auth_token "
                    "of its head to the same place here, or set RAY_AUTH_TOKEN_PATH"
                ) from error
            if address == "auto" and isinstance(error, ConnectionError):
                raise StartError(
                    "no Ray cluster runs on this machine: start one with `ray start --head`, name "
                    "another one's address, or leave --address out for one of kvmesh's own"
                ) from error
            words = " ".join(str(error).split())
            raise StartError(f"cannot join the Ray cluster at {address}: {words}") from error


def _check_listens(address: str) -> None:
    """Raises StartError if nothing is at HOST:PORT, where Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise StartError(f"no Ray cluster is at {address}: {error}") from error


@contextlib.contextmanager
def _captured_stderr() -> Iterator[IO[bytes]]:
    """A file with what this process writes to stderr meanwhile, from C++ too."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)
