"""Starts HAProxy for Ray Serve with a configuration that is safe for it.

    python -I haproxy_launcher.py BINARY HOST -f CONFIGURATION …

Serve runs this in place of HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH) after it has written the
configuration. There the pages with statistics and metrics are open to every interface, and a
proxy that has just started, and does not know the application yet, answers that there is none.
HOST is where clients may connect, "" for where Serve says: replicas listen there, too.
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
_SECTIONS = re.compile(r"^(?=\S)", re.MULTILINE)
_FOR_CLIENTS = ("frontend http_frontend\n", "frontend grpc_frontend\n")
_ADDRESS = re.compile(r"^(\s*bind )[^\s:]*:(\d+)", re.MULTILINE)
_OPEN_TO_ALL = re.compile(r"^(\s*bind )\*?:(\d+)", re.MULTILINE)
_SOCKET_FOR_ALL = re.compile(r"^(\s*stats socket .*) mode 666 ", re.MULTILINE)
_ERROR_FILE = re.compile(r"^(\s*)errorfile (502|503) .*$", re.MULTILINE)
# Where bodies are spliced, HAProxy misses about one in a hundred clients that leave right after
# theirs, and the replica computes an answer for nobody.
_SPLICING = re.compile(r"^\s*option splice-(request|response|auto)\n", re.MULTILINE)
# No replica is up, or the one that had the call has died: clients try again.
_UNAVAILABLE = (
    r"""\g<1>http-error status \g<2> content-type application/json hdr retry-after 1 """
    r"""string '{"error":{"message":"the server that has the call is lost or not up yet",'"""
    r"""'"type":"service_unavailable_error","param":null,"code":"not_ready"}}'"""
)
_NO_APPLICATION = re.compile(
    r'hdr grpc-status 5 hdr grpc-message "Application metadata not set\.[^"]*"'
)
# UNAVAILABLE: clients try again.
_NOT_READY = 'hdr grpc-status 14 hdr grpc-message "the front proxy is starting"'


def hardened(configuration: str, host: str) -> str:
    """The configuration with its internal pages and sockets closed to others.

    Listeners without an address are moved to loopback, those for clients to `host`, if there is
    one. While no application is known, which is so for a moment after a restart,
    calls are answered with UNAVAILABLE in place of NOT_FOUND.
    Over HTTP, 502 and 503 are what they are in place of 500, in the shape of OpenAI's errors.
    A client that leaves is noticed: bodies are not spliced.
    """
    closed = "".join(_closed(section, host) for section in _SECTIONS.split(configuration))
    closed = _SOCKET_FOR_ALL.sub(r"\g<1> mode 600 ", closed)
    closed = _ERROR_FILE.sub(_UNAVAILABLE, closed)
    closed = _SPLICING.sub("", closed)
    return _NO_APPLICATION.sub(_NOT_READY, closed)


def _closed(section: str, host: str) -> str:
    if section.startswith(_FOR_CLIENTS):
        return _ADDRESS.sub(rf"\g<1>{host}:\g<2>", section) if host else section
    return _OPEN_TO_ALL.sub(r"\g<1>127.0.0.1:\g<2>", section)


def main(binary: str, host: str, arguments: list[str]) -> None:
    path = Path(arguments[arguments.index("-f") + 1])
    path.write_text(hardened(path.read_text(), host))
    # A soft stop: it accepts nothing new, and ends with its last stream.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
