"""The gRPC methods of an ingress, on the server that Ray Serve runs in its replica.

    service(metadata) ── unknown caller, too many calls ──► status, and the body is never read
        │
        └── wait for a turn ──► read and parse the request ──► IngressService ──► replies

Serve's own way to a replica's methods parses a message before anyone can look at its key, and
costs more per reply than everything else on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc.aio._server import Server  # the class that Serve's is derived from
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kvmesh.client.status import TRAILER, encode
from kvmesh.cluster.contract_methods import METHODS, ContractMethod
from kvmesh.cluster.errors import NotReadyError
from kvmesh.cluster.ingress import error_table
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.cluster.ingress.unknown_fields import check_known
from kvmesh.cluster.ingress.validate import MAX_ID_CHARS, Limits, check_size
from kvmesh.cluster.reception import (
    READ_TIMEOUT_S,
    Headers,
    Reception,
    UnreadReplyError,
    report,
    sent,
)
from kvmesh.cluster.telemetry.meters import IngressMeters

logger = logging.getLogger("ray.serve")

HEALTH_POLL_S = 1.0
MAX_REFLECTION_BYTES = 4096

Context = Any  # grpc.aio's, whose class is not public


_REFLECTION: Any = reflection.aio.ReflectionServicer([*METHODS, "grpc.health.v1.Health"])


class GrpcFront:
    """Serves calls with an IngressService; all methods belong to one event loop."""

    def __init__(
        self,
        service: IngressService,
        reception: Reception,
        limits: Limits,
        meters: IngressMeters,
    ) -> None:
        self._service = service
        self._reception = reception
        self._limits = limits
        self._meters = meters

    async def serve(self, method: ContractMethod, context: Context) -> None:
        result, request_id, tenant = "cancelled", "", None
        with self._reception.call() as at_its_end:
            try:
                caller = self._reception.caller(_headers(context))
                tenant = caller.tenant
                self._reception.admit(caller, at_its_end, method.admin)
                request = await self._receive(method, caller.tenant, context)
                request_id = str(getattr(request, "request_id", ""))[:MAX_ID_CHARS]
                replies = method.call(self._service, request, caller.tenant)
                del request  # it may be large, and a stream long
                async with contextlib.aclosing(replies):
                    async for reply in replies:
                        await sent(context.write(reply.SerializeToString()))
                result = "ok"
            except UnreadReplyError as error:
                # Without more: to the SDK the stream is lost, so it resumes if it reads again.
                context.set_code(grpc.StatusCode.CANCELLED)
                context.set_details(str(error))
            except Exception as error:
                result = fail(context, error, request_id, tenant or "")
            finally:
                self._meters.call(method.name, result, tenant)

    async def _receive(self, method: ContractMethod, tenant: str, context: Context) -> Message:
        """The call's request, when it is its turn. Raises InvalidFieldError(request)."""
        async with self._reception.turn(tenant):
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    body = await _only_message(context)
            except TimeoutError:
                refuse("request", f"must arrive within {READ_TIMEOUT_S:g} s")
            return parse(method.request, body, self._limits)

    async def reflect(self, context: Context) -> None:
        """grpc.reflection: the contract's descriptors, for tools such as grpcurl."""
        try:
            self._reception.caller(_headers(context))
            async for reply in _REFLECTION.ServerReflectionInfo(_reflection_calls(context), None):
                await sent(context.write(reply.SerializeToString()))
        except Exception as error:
            fail(context, error, "")

    # grpc.health.v1.Health; needs no key, as probes have none.

    def check(self, body: bytes, context: Context) -> bytes:
        request = _health_request(body)
        if request.service not in ("", *METHODS):
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"there is no service {request.service[:MAX_ID_CHARS]!r}")
        return _health_reply(self._health())

    async def watch(self, context: Context) -> None:
        request = _health_request(await _only_message(context))
        if request.service not in ("", *METHODS):
            await context.write(_health_reply(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN))
            return
        last = None
        while True:
            if (status := self._health()) != last:
                await context.write(_health_reply(status))
                last = status
            await asyncio.sleep(HEALTH_POLL_S)

    def _health(self) -> int:
        if self._service.ready:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING


def parse(kind: type[Message], body: object, limits: Limits) -> Message:
    """A request from its bytes. Raises InvalidFieldError(request) if it is none, or too large."""
    if not isinstance(body, bytes):
        refuse("request", "must be sent")
    check_size(len(body), limits)
    try:
        request = kind.FromString(body)
    except DecodeError:
        refuse(
            "request",
            f"must be a valid protobuf message with text in UTF-8; the {len(body):,} bytes "
            "received are not",
        )
    check_known(request, body)
    return request


async def _only_message(context: Context) -> object:
    """The first message, and nothing after it; no bytes if there is none.

    A call that ends before its request has ended is reset, which costs the proxy its connection.
    """
    body = await context.read()
    if body is not grpc.aio.EOF and await context.read() is not grpc.aio.EOF:
        refuse("request", "must be a single message")
    return body


async def _reflection_calls(context: Context) -> AsyncIterator[Any]:
    """What a reflection call asks, one after the other."""
    while (body := await context.read()) is not grpc.aio.EOF:
        if len(body) > MAX_REFLECTION_BYTES:
            refuse("request", f"must have at most {MAX_REFLECTION_BYTES} bytes, got {len(body)}")
        try:
            yield reflection_pb2.ServerReflectionRequest.FromString(body)
        except DecodeError:
            refuse("request", "must be a grpc.reflection.v1alpha.ServerReflectionRequest")


def _health_request(body: object) -> health_pb2.HealthCheckRequest:
    try:
        return health_pb2.HealthCheckRequest.FromString(body if isinstance(body, bytes) else b"")
    except DecodeError:
        return health_pb2.HealthCheckRequest(service="?")


def _health_reply(status: int) -> bytes:
    return health_pb2.HealthCheckResponse(status=status).SerializeToString()


def fail(context: Context, error: Exception, request_id: str, tenant: str = "") -> str:
    """Put an error into a call's status and log what clients must not see; its metrics label."""
    wire = report(error, _headers(context), request_id, tenant)
    message, trailer = encode(wire)
    context.set_code(error_table.status_code(wire))
    context.set_details(message)
    context.set_trailing_metadata(((TRAILER, trailer),))
    return error_table.reason_label(wire)


def _headers(context: Context) -> Headers:
    headers: Headers = context.invocation_metadata() or ()
    return headers


# Serve's server

_front: GrpcFront | None = None


def attach(front: GrpcFront) -> None:
    """Serve the calls of this process's server with `front`."""
    global _front
    _front = front


def add_to_server(_: Any, server: Any) -> None:
    """Named in Serve's options: called with each gRPC server of Serve before it starts.

    One runs in every ingress replica, and one in Serve's proxy, which HAProxy falls back to while
    there is no replica.
    """
    services: dict[str, Mapping[str, Callable[..., Awaitable[None]]]] = {
        service: {method.name: partial(GrpcFront.serve, method=method) for method in methods}
        for service, methods in METHODS.items()
    }
    services["grpc.health.v1.Health"] = {"Watch": GrpcFront.watch}
    services[reflection.SERVICE_NAME] = {"ServerReflectionInfo": GrpcFront.reflect}
    for service, methods in services.items():
        # Not by Serve's own method, which would route the calls through Serve. Registered ones
        # are accepted apart from one another: a health check does not wait behind other calls.
        handlers = {name: _reading_itself(method) for name, method in methods.items()}
        if service == "grpc.health.v1.Health":
            # One message each way costs the event loop half as many turns as two streams.
            handlers["Check"] = grpc.unary_unary_rpc_method_handler(_check)
        Server.add_registered_method_handlers(server, service, handlers)


async def _check(body: bytes, context: Context) -> bytes:
    if _front is None:
        fail(context, NotReadyError(), "")
        return b""
    return _front.check(body, context)


def _reading_itself(method: Callable[..., Awaitable[None]]) -> Any:
    """A handler that receives the request when it wants to, whether or not it is a stream."""

    async def handle(_: Any, context: Context) -> None:
        if _front is None:
            fail(context, NotReadyError(), "")
        else:
            await method(_front, context=context)

    return grpc.stream_stream_rpc_method_handler(handle)
