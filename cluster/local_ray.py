"""Ray on this machine, for one cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.environment import local_variables
from kvmesh.cluster.errors import StartError
from kvmesh.cluster.keys import protect_ray_token
from kvmesh.cluster.ports import Port, PortBlock
from kvmesh.cluster.processes import (
    adopt_orphans,
    children_named,
    descendants,
    end_descendants,
    is_dead,
)
from kvmesh.cluster.ray_node import start_node

# What runs continues without them, but nothing that dies is replaced.
RAY_PROCESSES = ("gcs_server", "raylet")


class LocalRay:
    """Its processes, files, ports and environment variables, which all end with the cluster.

    ports: taken for it, and for what the cluster's settings leave open
    """

    def __init__(self, ports: PortBlock) -> None:
        self._ports = ports
        self._directory: Path | None = None
        self._node: Any = None
        self._environ: dict[str, str | None] = {}  # what its variables were before
        self._keep: frozenset[int] = frozenset()
        self._processes: dict[str, psutil.Process] = {}

    def start(self, config: ClusterConfig) -> Any:
        """What ray.init returns. Raises StartError."""
        self._keep = descendants()
        adopt_orphans()
        # Its path must be short, because Unix sockets of Ray and HAProxy are placed in it.
        self._directory = Path(tempfile.mkdtemp(prefix="kvmesh-", dir=_short_tmp()))
        protect_ray_token(os.environ)
        variables = local_variables(config, self._directory / "p", self._ports)
        self._environ = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        scratch = self._directory / "t"
        scratch.mkdir()
        try:
            with _temporary_directory(scratch):
                self._node = start_node(config, self._directory / "ray", self._ports[Port.GCS])
            ray = import_ray()
            with own_sigterm():
                context = ray.init(self._node.address, logging_level="ERROR", log_to_driver=False)
        except Exception as error:  # the class that Ray raises when its node is not up in time
            words = " ".join(str(error).split()) + _gcs_words(self._directory)
            raise StartError(f"Ray did not start: {words}") from error
        self._processes = children_named(RAY_PROCESSES, self._keep)
        return context

    def dead_part(self) -> str | None:
        """Ray's process that has died, if one has."""
        return next((name for name, x in self._processes.items() if is_dead(x)), None)

    def stop(self) -> None:
        """End Ray's own processes in the order that it does itself. None may be dead already."""
        if self._node is not None:
            self._node.kill_all_processes(check_alive=False, allow_graceful=True)
            self._node = None

    def end(self) -> None:
        """End all that is left of its processes, and delete its files."""
        if self._directory is not None:
            end_descendants(self._keep)
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def release(self) -> None:
        """Give back the ports and the environment; idempotent."""
        self._ports.release()
        for name, value in self._environ.items():
            # They are this cluster's: neither another one nor a child process may have them.
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environ = {}


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep a program's handler of SIGTERM, which `ray.init` replaces with one that exits.

    That one would do so at every signal, also within the cleanup after the first.
    """
    handler = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()  # elsewhere Ray leaves it
    if not is_main or not callable(handler):
        yield
        return
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)  # it came meanwhile
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def import_ray() -> Any:
    """Import Ray late, because it reads the environment when it is imported."""
    import ray

    return ray


def check_ray_sends_tokens() -> None:
    """Raises StartError if this process cannot use a cluster that asks for tokens, as ours do.

    Ray reads once, when it is imported, whether it sends them. Without them it would wait for the
    cluster until a timeout, and not say why.
    """
    raylet: Any = sys.modules.get("ray._raylet")
    if raylet and raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
        raise StartError(
            "this process has imported Ray already, without authentication: start the cluster "
            "before Ray is imported, or set RAY_AUTH_MODE=token before that"
        )


def _gcs_words(directory: Path) -> str:
    """The last line that Ray's GCS has logged, in a log that `end` deletes."""
    lines = [
        line.strip()
        for path in sorted(directory.glob("ray/session_latest/logs/gcs_server.*"))
        for line in path.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    return f"; the log of its GCS ends with: {lines[-1]}" if lines else ""


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Hide what Ray prints about the deaths of its actors during shutdown, also from C++."""
    kept: dict[int, int] = {}
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it was closed before we started
            kept[stream] = os.dup(stream)
    try:
        with open(os.devnull, "w") as null:
            for stream in kept:
                os.dup2(null.fileno(), stream)
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)


def _short_tmp() -> str:
    """The temporary directory, or /tmp if its path is too long for sockets in it.

    HAProxy accepts paths of up to 97 characters, and Serve adds 57 of them.
    """
    chosen = tempfile.gettempdir()
    return chosen if len(chosen) <= 12 or not os.access("/tmp", os.W_OK) else "/tmp"


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Iterator[None]:
    """Set TMPDIR for processes started meanwhile, so that their files go with the cluster."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
