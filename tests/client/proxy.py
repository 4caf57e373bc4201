"""An HTTP proxy as the environment names it, which only notes what it is asked for."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


@contextmanager
def http_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yields the first line of every request to it; it refuses them all."""
    lines: list[str] = []

    class Proxy(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            lines.append(self.rfile.readline().decode().strip())
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        for name in EXCEPTIONS:
            monkeypatch.delenv(name, raising=False)
        for name in VARIABLES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
        try:
            yield lines
        finally:
            server.shutdown()
            thread.join()
