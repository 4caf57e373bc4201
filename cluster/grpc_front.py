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
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import grpc
from google.protobuf.message import DecodeError, Message
from grpc.aio._server import Server  # the class that Serve's is derived from
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kvmesh.client.status import TRAILER, encode
from kvmesh.cluster.contract_methods import METHODS, ContractMethod
from kvmesh.cluster.errors import IngressBusyError, NotAllowedError, NotReadyError
from kvmesh.cluster.ingress import error_table
from kvmesh.cluster.ingress.authenticate import Caller
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.cluster.ingress.unknown_fields import check_known
from kvmesh.cluster.ingress.validate import MAX_ID_CHARS, Limits
from kvmesh.cluster.telemetry.logs import about
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.cluster.telemetry.traces import note_headers

logger = logging.getLogger("ray.serve")

READERS = 64  # requests that are received at the same time
READERS_PER_TENANT = 16
TURN_TIMEOUT_S = 1.0
READ_TIMEOUT_S = 30.0
HEALTH_POLL_S = 1.0
MAX_REFLECTION_BYTES = 4096
_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.{0,100}")

Context = Any  # grpc.aio's, whose class is not public


_REFLECTION: Any = reflection.aio.ReflectionServicer([*METHODS, "grpc.health.v1.Health"])


class GrpcFront:
    """Serves calls with an IngressService; all methods belong to one event loop.

    authenticate: who makes a call, by its metadata; raises UnauthenticatedError
    max_calls: open at the same time
    turn_timeout_s: how long a call waits until it may send its request
    """

    def __init__(
        self,
        service: IngressService,
        authenticate: Callable[[Any], Caller],
        limits: Limits,
        meters: IngressMeters,
        max_calls: int,
        turn_timeout_s: float = TURN_TIMEOUT_S,
    ) -> None:
        self._service = service
        self._authenticate = authenticate
        self._limits = limits
        self._meters = meters
        self._max_calls = max_calls
        self._turn_timeout_s = turn_timeout_s
        self._calls = 0
        self._readers = asyncio.Semaphore(READERS)
        self._tenants: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def serve(self, method: ContractMethod, context: Context) -> None:
        self._calls += 1
        result, request_id, tenant = "cancelled", "", None
        try:
            caller = self._authenticate(context.invocation_metadata())
            tenant = caller.tenant
            note_headers(context.invocation_metadata())
            if method.admin and not caller.admin:
                raise NotAllowedError()
            if self._calls > self._max_calls:
                raise IngressBusyError(f"this ingress already serves {self._max_calls} calls")
            request = await self._receive(method, caller.tenant, context)
            request_id = str(getattr(request, "request_id", ""))[:MAX_ID_CHARS]
            replies = method.call(self._service, request, caller.tenant)
            del request  # it may be large, and a stream long
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    await context.write(reply.SerializeToString())
            result = "ok"
        except Exception as error:
            result = fail(context, error, request_id, tenant or "")
        finally:
            self._calls -= 1
            self._meters.call(method.name, result, tenant)

    async def _receive(self, method: ContractMethod, tenant: str, context: Context) -> Message:
        """The call's request, when it is its turn. Raises InvalidFieldError(request)."""
        async with self._turn(tenant):
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    body = await _only_message(context)
            except TimeoutError:
                refuse("request", f"must arrive within {READ_TIMEOUT_S:g} s")
            return parse(method.request, body, self._limits)

    @contextlib.asynccontextmanager
    async def _turn(self, tenant: str) -> AsyncIterator[None]:
        """A turn to receive a request: memory holds a bounded number of them as bytes.

        No tenant has all turns, or one that sends slowly could keep out the others. Nobody waits
        long: the proxy holds back what a client sends in all its calls while one is not read,
        perhaps those that have a turn. Raises IngressBusyError.
        """
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = asyncio.Semaphore(READERS_PER_TENANT)
        async with contextlib.AsyncExitStack() as turns:
            try:
                async with asyncio.timeout(self._turn_timeout_s):
                    for readers in (own, self._readers):
                        await turns.enter_async_context(readers)
            except TimeoutError:
                raise IngressBusyError(
                    "too many requests are being received; send them one after the other"
                ) from None
            yield

    async def reflect(self, context: Context) -> None:
        """grpc.reflection: the contract's descriptors, for tools such as grpcurl."""
        try:
            self._authenticate(context.invocation_metadata())
            async for reply in _REFLECTION.ServerReflectionInfo(_reflection_calls(context), None):
                await context.write(reply.SerializeToString())
        except Exception as error:
            fail(context, error, "")

    # grpc.health.v1.Health; needs no key, as probes have none.

    async def check(self, context: Context) -> None:
        request = await _health_request(context)
        if request.service not in ("", *METHODS):
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"there is no service {request.service[:MAX_ID_CHARS]!r}")
            return
        await context.write(_health_reply(self._health()))

    async def watch(self, context: Context) -> None:
        request = await _health_request(context)
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
    if len(body) > limits.max_request_bytes:
        refuse(
            "request", f"must have at most {limits.max_request_bytes:,} bytes, got {len(body):,}"
        )
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


async def _health_request(context: Context) -> health_pb2.HealthCheckRequest:
    body = await _only_message(context)
    try:
        return health_pb2.HealthCheckRequest.FromString(body if isinstance(body, bytes) else b"")
    except DecodeError:
        return health_pb2.HealthCheckRequest(service="?")


def _health_reply(status: int) -> bytes:
    return health_pb2.HealthCheckResponse(status=status).SerializeToString()


def fail(context: Context, error: Exception, request_id: str, tenant: str = "") -> str:
    """Put an error into a call's status and log what clients must not see; its metrics label."""
    trace = _trace_id(context.invocation_metadata())
    fields = about(f"{tenant}/{request_id}")
    if error_table.is_expected(error):
        logger.info("refused request %r%s: %s", request_id, trace, error, extra=fields)
    else:
        logger.error("failed at request %r%s", request_id, trace, exc_info=error, extra=fields)
    wire = error_table.to_wire(error, request_id)
    message, trailer = encode(wire)
    context.set_code(error_table.status_code(wire))
    context.set_details(message)
    context.set_trailing_metadata(((TRAILER, trailer),))
    return error_table.reason_label(wire)


def _trace_id(metadata: Any) -> str:
    """For a log: the trace that a call belongs to, by its `traceparent` as the W3C defines it."""
    for name, value in metadata or ():
        if name == "traceparent" and (found := _TRACEPARENT.fullmatch(str(value))):
            return f" of trace {found[1]}"
    return ""


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
    services["grpc.health.v1.Health"] = {"Check": GrpcFront.check, "Watch": GrpcFront.watch}
    services[reflection.SERVICE_NAME] = {"ServerReflectionInfo": GrpcFront.reflect}
    for service, methods in services.items():
        # Not by Serve's own method, which would route the calls through Serve. Registered ones
        # are accepted apart from one another: a health check does not wait behind other calls.
        Server.add_registered_method_handlers(
            server,
            service,
            {name: _reading_itself(method) for name, method in methods.items()},
        )


def _reading_itself(method: Callable[..., Awaitable[None]]) -> Any:
    """A handler that receives the request when it wants to, whether or not it is a stream."""

    async def handle(_: Any, context: Context) -> None:
        if _front is None:
            fail(context, NotReadyError(), "")
        else:
            await method(_front, context=context)

    return grpc.stream_stream_rpc_method_handler(handle)
