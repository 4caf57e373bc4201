"""Starts HAProxy for Ray Serve with its internal pages on loopback only.

    python -I haproxy_launcher.py BINARY -f CONFIGURATION …

Serve runs this in place of HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH) after it has written the
configuration, in which the pages with statistics and metrics are open to every interface.
HAProxy also ends, once its streams have, when the process of Serve that started it dies.
Imports nothing of kvmesh: it runs at every change of the configuration.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
_OPEN_TO_ALL = re.compile(r"^(\s*bind )\*?:(\d+)", re.MULTILINE)
_SOCKET_FOR_ALL = re.compile(r"^(\s*stats socket .*) mode 666 ", re.MULTILINE)


def on_loopback(configuration: str) -> str:
    """The configuration with the listeners that have no address on loopback."""
    closed = _OPEN_TO_ALL.sub(r"\g<1>127.0.0.1:\g<2>", configuration)
    return _SOCKET_FOR_ALL.sub(r"\g<1> mode 600 ", closed)


def main(binary: str, arguments: list[str]) -> None:
    path = Path(arguments[arguments.index("-f") + 1])
    path.write_text(on_loopback(path.read_text()))
    # A soft stop: it accepts nothing new, and ends with its last stream.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
