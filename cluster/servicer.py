"""Registers the gRPC services with Serve, whose options name these functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kvmesh.cluster.ingress.validate import Unparsable
from kvmesh.protos.kvmesh.v1.kvmesh_pb2_grpc import add_KVMeshServicer_to_server

SERVICER_FUNCTIONS = (
    "kvmesh.cluster.servicer.add_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)


def add_to_server(servicer: Any, server: Any) -> None:
    """Like the generated function, but malformed messages reach the handler as Unparsable.

    gRPC would reply INTERNAL to them; the ingress replies INVALID_ARGUMENT.
    """
    recorder: Any = _LenientServer(server)
    add_KVMeshServicer_to_server(servicer, recorder)


class _LenientServer:
    """Registers handlers with deserialisers that never raise."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Does nothing: the next call registers the same handlers with their names."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        lenient = {
            method: handler._replace(request_deserializer=_lenient(handler.request_deserializer))
            for method, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(service, lenient)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_registered_method_handlers(service, lenient)


def _lenient(deserialise: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialise(data)
        except DecodeError:
            return Unparsable(len(data))

    return parse
