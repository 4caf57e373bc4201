"""A real gRPC server for the SDK's tests, whose methods run scripted actions."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from kvmesh.client.status import TRAILER, encode
from kvmesh.protos import pb, pb_grpc

Action = Callable[[Any, grpc.ServicerContext], Any]


def fail(context: grpc.ServicerContext, error: pb.Error) -> None:
    """End the call with a status as the contract specifies."""
    message, trailer = encode(error)
    context.set_trailing_metadata(((TRAILER, trailer),))
    context.abort(next(code for code in grpc.StatusCode if code.value[0] == error.code), message)


def failing(error: pb.Error) -> Action:
    """An action that fails with an Error."""

    def act(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        fail(context, error)
        return iter(())

    return act


def aborting(
    code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, bytes], ...] = ()
) -> Action:
    """An action that fails with a bare status."""

    def act(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.set_trailing_metadata(trailers)
        context.abort(code, details)

    return act


def answering(reply: Any) -> Action:
    return lambda request, context: reply


def started(request: pb.GenerateRequest, **fields: Any) -> pb.GenerateStreamResponse:
    values = {"model": "m", "model_revision": "r1", "group": "g0", "kv_format": "int8", "seed": 7}
    return pb.GenerateStreamResponse(
        started=pb.Started(request_id=request.request_id, **{**values, **fields})
    )


def delta(offset: int, text: str, *ids: int, index: int = 0) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(
        delta=pb.Delta(index=index, text=text, token_ids=ids, token_offset=offset)
    )


def finished(
    index: int = 0, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_LENGTH
) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(
        choice_finished=pb.ChoiceFinished(index=index, finish_reason=reason)
    )


def usage(**fields: Any) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(usage=pb.Usage(**fields))


class ScriptedServicer(pb_grpc.KVMeshServicer):
    """Runs the scripted actions in order, one per call; the last one repeats.

    requests, metadata: what was received, in order
    ended: set whenever a streaming call ends, for any reason
    """

    def __init__(self, *actions: Action) -> None:
        self._actions = deque(actions)
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.ended = threading.Event()

    def _act(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        action = self._actions.popleft() if len(self._actions) > 1 else self._actions[0]
        return action(request, context)

    def GenerateStream(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(self.ended.set)
        yield from self._act(request, context)

    Generate = Tokenize = Detokenize = Abort = _act
    EstimateBudget = Explain = GetModelInfo = GetTenantLoads = _act


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no other process gets, and on which nothing listens but servers of gRPC."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC's servers do
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def far_away(target: str, delay_s: float) -> Iterator[str]:
    """A connection to the server at `target`, whose replies take longer by `delay_s`."""
    host, _, port = target.rpartition(":")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection((host, int(port))) as server,
        futures.ThreadPoolExecutor(2) as threads,
    ):

        def pass_on(source: socket.socket, sink: socket.socket, wait_s: float) -> None:
            with contextlib.suppress(OSError):  # one of the two has closed it
                while data := source.recv(65536):
                    time.sleep(wait_s)
                    sink.sendall(data)
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        def connect() -> None:
            client, _ = listener.accept()
            with client:
                back = threads.submit(pass_on, server, client, delay_s)
                pass_on(client, server, 0.0)
                back.result()

        connected = threads.submit(connect)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        connected.result()


@contextmanager
def serving(
    servicer: pb_grpc.KVMeshServicer,
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
    max_receive_bytes: int = -1,
    options: tuple[tuple[str, int], ...] = (),
) -> Iterator[str]:
    """A server on a free port; yields its target."""
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=8),
        options=[("grpc.max_receive_message_length", max_receive_bytes), *options],
    )
    pb_grpc.add_KVMeshServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(grace=None).wait()
