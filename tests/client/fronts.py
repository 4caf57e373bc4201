"""A fake server behind gRPC, and one that speaks what the openai package expects."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

from kvmesh import FakeServer
from kvmesh.client.transport import RpcFailure
from kvmesh.protos import pb_grpc
from tests.client.servicer import serving


class FrontedServer(pb_grpc.KVMeshServicer):
    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def _unary(self, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return self._server.unary(request, context.invocation_metadata())
        except RpcFailure as failure:
            context.set_trailing_metadata(failure.trailers)
            context.abort(grpc.StatusCode[failure.code], failure.details)

    def GenerateStream(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from self._server.events(request, context.invocation_metadata())
        except RpcFailure as failure:
            context.set_trailing_metadata(failure.trailers)
            context.abort(grpc.StatusCode[failure.code], failure.details)

    Generate = Tokenize = Detokenize = Abort = _unary
    EstimateBudget = Explain = GetModelInfo = GetTenantLoads = _unary


@contextmanager
def fronted(server: FakeServer) -> Iterator[str]:
    """Yields the gRPC target of a fake server."""
    with serving(FrontedServer(server)) as target:
        yield target


class OpenAIHandler(BaseHTTPRequestHandler):
    """Chat completions.

    status: of every reply; None: there is no reply before `over` is set
    """

    status: int | None = 200
    over = threading.Event()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/chat/completions"
        if self.status is None:
            self.over.wait()
        elif self.status == 200 and request.get("stream"):
            chunks = [chunk_of({"delta": {"content": word}}) for word in ("Hel", "lo.")]
            body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
            self._reply("text/event-stream", f"{body}data: [DONE]\n\n")
        elif self.status == 200:
            message = {"role": "assistant", "content": "Hello."}
            choice = {"message": message, "finish_reason": "stop"}
            self._reply("application/json", json.dumps(chunk_of(choice)))
        else:
            error = {"message": "refused", "param": "messages", "code": None, "type": "x"}
            self._reply("application/json", json.dumps({"error": error}))

    def _reply(self, kind: str, body: str) -> None:
        assert self.status is not None
        self.send_response(self.status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body.encode())))
        self.send_header("retry-after", "3")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


def chunk_of(choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, **choice}],
    }  # fmt: skip


@contextmanager
def openai_server(status: int | None = 200) -> Iterator[str]:
    """Yields the base URL of a server that answers with this status, or not at all."""
    over = threading.Event()
    handler = type("Handler", (OpenAIHandler,), {"status": status, "over": over})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            over.set()
            server.shutdown()
            thread.join()
