"""Serve handles behind the protocols of peers.py.

A refusal crosses a handle as a value (`Failure`), not as an exception: Serve
would log it as a fault with a stack trace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from kvmesh.cluster.ingress.errors import EngineLostError, IngressError, NotReadyError
from kvmesh.cluster.peers import ClusterStatus, EngineReport, Explained, StreamOpened
from kvmesh.cluster.routing.errors import RoutingError
from kvmesh.cluster.routing.request import Estimate, Growth, Placement, PlaceRequest
from kvmesh.workers.errors import EngineError
from kvmesh.workers.request import EngineRequest, LeaseTerms, PageChanges, SequenceDelta

T = TypeVar("T")

ENGINE_CALL_TIMEOUT_S = 15.0
ROUTER_CALL_TIMEOUT_S = 15.0
_TRANSPORT_ERRORS = (RayError, RayServeException, grpc.aio.AioRpcError)


@dataclass(frozen=True, slots=True)
class Failure:
    """A typed error on its way through a handle."""

    error: Exception


async def outcome(work: Awaitable[T]) -> T | Failure:
    """For the serving side: the result, or the refusal as a value."""
    try:
        return await work
    except (EngineError, IngressError, RoutingError) as error:
        return Failure(error)


class _Caller:
    """Calls a deployment's methods; what the transport fails at becomes `lost`."""

    def __init__(self, handle: DeploymentHandle[Any], lost: type[IngressError]) -> None:
        self._handle = handle
        self._lost = lost

    async def call(self, method: str, *args: object, timeout_s: float | None) -> Any:
        response = getattr(self._handle, method).remote(*args)
        try:
            async with asyncio.timeout(timeout_s):
                result = await response
        except TimeoutError:
            response.cancel()
            raise self._lost() from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        except _TRANSPORT_ERRORS as error:
            raise self._lost() from error
        if isinstance(result, Failure):
            raise result.error
        return result

    async def stream(self, method: str, *args: object) -> AsyncGenerator[Any, None]:
        responses = getattr(self._handle.options(stream=True), method).remote(*args)
        try:
            async for item in responses:
                yield item
        except _TRANSPORT_ERRORS as error:
            raise self._lost() from error
        finally:
            # Without it the engine would not learn that nobody listens any more.
            responses.cancel()


class ServeEngineClient:
    """`peers.EngineClient` over the handle of one engine deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._caller = _Caller(handle, EngineLostError)

    async def submit(self, request: EngineRequest, epoch: str) -> None:
        await self._caller.call("submit", request, epoch, timeout_s=ENGINE_CALL_TIMEOUT_S)

    async def abort(self, request_ids: Sequence[str]) -> int:
        ended = await self._caller.call("abort", list(request_ids), timeout_s=ENGINE_CALL_TIMEOUT_S)
        return int(ended)

    async def outputs(
        self, client_id: str
    ) -> AsyncGenerator[StreamOpened | list[SequenceDelta], None]:
        stream = self._caller.stream("outputs", client_id)
        try:
            async for message in stream:
                yield message
        finally:
            await stream.aclose()

    async def extend(self, request_ids: Sequence[str], lease: LeaseTerms) -> None:
        await self._caller.call("extend", list(request_ids), lease, timeout_s=ENGINE_CALL_TIMEOUT_S)

    async def report(self, pages_after: int = 0) -> tuple[EngineReport, PageChanges]:
        report, changes = await self._caller.call(
            "report", pages_after, timeout_s=ENGINE_CALL_TIMEOUT_S
        )
        assert isinstance(report, EngineReport) and isinstance(changes, PageChanges)
        return report, changes


class ServeRouterClient:
    """`peers.RouterClient` over the router deployment's handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._caller = _Caller(handle, NotReadyError)

    async def place(
        self, request: PlaceRequest, *, ticket: str, supersede: bool = False
    ) -> Placement:
        # The router itself keeps the time of what waits there.
        placement = await self._caller.call("place", request, ticket, supersede, timeout_s=None)
        assert isinstance(placement, Placement)
        return placement

    async def begun(self, lease_id: str) -> None:
        await self._caller.call("begun", lease_id, timeout_s=ROUTER_CALL_TIMEOUT_S)

    async def grow(self, lease_id: str, request: PlaceRequest, output_tokens: int) -> Growth | None:
        growth = await self._caller.call(
            "grow", lease_id, request, output_tokens, timeout_s=ROUTER_CALL_TIMEOUT_S
        )
        assert growth is None or isinstance(growth, Growth)
        return growth

    async def release(self, lease_id: str, output_tokens: int | None = None) -> None:
        await self._caller.call("release", lease_id, output_tokens, timeout_s=ROUTER_CALL_TIMEOUT_S)

    async def abort(self, request_id: str) -> bool:
        return bool(await self._caller.call("abort", request_id, timeout_s=ROUTER_CALL_TIMEOUT_S))

    async def withdraw(self, request_id: str, ticket: str) -> None:
        await self._caller.call("withdraw", request_id, ticket, timeout_s=ROUTER_CALL_TIMEOUT_S)

    async def estimate(self, request: PlaceRequest) -> Estimate:
        estimate = await self._caller.call("estimate", request, timeout_s=ROUTER_CALL_TIMEOUT_S)
        assert isinstance(estimate, Estimate)
        return estimate

    async def explain(self, request_id: str) -> tuple[Explained, ...]:
        explained = await self._caller.call("explain", request_id, timeout_s=ROUTER_CALL_TIMEOUT_S)
        assert isinstance(explained, tuple)
        return explained

    async def suspect(self, group: str, epoch: str) -> None:
        await self._caller.call("suspect", group, epoch, timeout_s=ROUTER_CALL_TIMEOUT_S)

    async def status(self, *, fresh: bool = False) -> ClusterStatus:
        status = await self._caller.call("status", fresh, timeout_s=ROUTER_CALL_TIMEOUT_S)
        assert isinstance(status, ClusterStatus)
        return status
