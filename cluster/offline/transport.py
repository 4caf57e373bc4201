"""The SDK's transports to a cluster in this process.

A call passes through the same validation and the same table of errors as over gRPC, and fails as it
would there; only bytes are saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from google.protobuf.message import Message

from kvmesh.client.checks import Metadata
from kvmesh.client.errors import ClosedError
from kvmesh.client.status import TRAILER, encode
from kvmesh.client.transport import GENERATE_STREAM, Method, Reply, Request, RpcFailure
from kvmesh.cluster.contract_methods import METHODS
from kvmesh.cluster.ingress.error_table import status_code
from kvmesh.cluster.offline.local_cluster import TENANT, EngineFailedError, LocalCluster
from kvmesh.cluster.offline.loop_thread import LoopThread
from kvmesh.cluster.reception import report
from kvmesh.v1 import kvmesh_pb2 as pb


async def replies(
    cluster: LocalCluster, method: Method[Any, Any], request: Message, timeout_s: float | None
) -> AsyncGenerator[Any, None]:
    """The replies of one call, for one task. Raises RpcFailure."""
    (found,) = [x for x in METHODS[method.service] if x.name == method.name]
    try:
        events = found.call(cluster.ingress, request, TENANT)
        async with asyncio.timeout(timeout_s), cluster.call(), contextlib.aclosing(events):
            async for event in events:
                yield event
    except TimeoutError:
        raise RpcFailure("DEADLINE_EXCEEDED", "the call took too long") from None
    except EngineFailedError as error:
        raise RpcFailure("INTERNAL", str(error)) from error
    except Exception as error:
        wire = report(error, (), str(getattr(request, "request_id", "")), TENANT)
        message, trailer = encode(wire)
        raise RpcFailure(status_code(wire).name, message, ((TRAILER, trailer),)) from error


async def _only(events: AsyncGenerator[Any, None]) -> Any:
    async with contextlib.aclosing(events):
        async for event in events:
            return event
    raise AssertionError("unreachable: a unary method has a reply")


class AsyncLocalTransport:
    """For an AsyncClient in the cluster's own event loop."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    async def unary(
        self,
        method: Method[Request, Reply],
        request: Request,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> Reply:
        return cast(Reply, await _only(replies(self._cluster, method, request, timeout_s)))

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> AsyncLocalStreamCall:
        return AsyncLocalStreamCall(replies(self._cluster, GENERATE_STREAM, request, timeout_s))

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """The cluster's owner closes it."""


class AsyncLocalStreamCall:
    """For one task."""

    def __init__(self, events: AsyncGenerator[Any, None]) -> None:
        self._events = events
        self._loop = asyncio.get_running_loop()

    async def read(self) -> pb.GenerateStreamResponse | None:
        return await anext(self._events, None)

    def cancel(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its generators with it
            self._loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        self._closing = asyncio.ensure_future(self._events.aclose())


class LocalTransport:
    """For a Client in any thread.

    owner: kept while the transport is, which would otherwise lose its cluster
    """

    def __init__(self, cluster: LocalCluster, loop: LoopThread, owner: object) -> None:
        self._cluster = cluster
        self._loop = loop
        self._owner = owner

    def unary(
        self,
        method: Method[Request, Reply],
        request: Request,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> Reply:
        self._check_open()
        work = _only(replies(self._cluster, method, request, timeout_s))
        return cast(Reply, self._loop.run(work))

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> LocalStreamCall:
        self._check_open()
        events = replies(self._cluster, GENERATE_STREAM, request, timeout_s)
        return LocalStreamCall(self._loop, events, self)

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        """The cluster's owner closes it."""

    def _check_open(self) -> None:
        if self._loop.closed:
            raise ClosedError("the LLM has been closed")


class LocalStreamCall:
    """A stream that a task in the loop reads, and hands to the reader's thread.

    What a slow reader leaves unread is bounded by the request's own output.
    """

    def __init__(
        self, loop: LoopThread, events: AsyncGenerator[Any, None], transport: LocalTransport
    ) -> None:
        self._loop = loop
        self._transport = transport  # keeps the cluster
        self._cancelled = False
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pumped = loop.submit(self._pump(events))

    def read(self) -> pb.GenerateStreamResponse | None:
        event = self._ready.get()
        if isinstance(event, BaseException):
            self._ready.put(event)  # for those who read again
            raise event
        return cast("pb.GenerateStreamResponse | None", event)

    def cancel(self) -> None:
        self._cancelled = True
        self._pumped.cancel()

    async def _pump(self, events: AsyncGenerator[Any, None]) -> None:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self._ready.put(event)
            self._ready.put(None)
        except Exception as error:
            self._ready.put(error)
        except asyncio.CancelledError:
            ended: Exception = ClosedError("the LLM has been closed")
            if self._cancelled:
                ended = RpcFailure("CANCELLED", "the call has ended")
            self._ready.put(ended)
            raise
