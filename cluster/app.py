"""The Serve application: ingress replicas, one router, one deployment for each group.

The classes here are what Serve calls; each delegates to an object that knows no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from kvmesh.client.status import TRAILER, encode_details, encode_trailer
from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.engine_service import EngineService
from kvmesh.cluster.handles import Failure, ServeEngineClient, ServeRouterClient, outcome
from kvmesh.cluster.ingress import errors
from kvmesh.cluster.ingress.authenticate import Authenticator
from kvmesh.cluster.ingress.codec import ModelCodec
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.cluster.ingress.validate import MAX_ID_CHARS, Limits
from kvmesh.cluster.metrics import EngineMeters, IngressMeters, RouterMeters
from kvmesh.cluster.peers import ClusterStatus, EngineReport, Explained, StreamOpened
from kvmesh.cluster.rank_actors import RankActors, RankResources
from kvmesh.cluster.ray_meters import RayMeterFactory
from kvmesh.cluster.router_service import RouterService
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.request import Estimate, Growth, Placement, PlaceRequest
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.request import EngineRequest, LeaseTerms, PageChanges, SequenceDelta

logger = logging.getLogger("ray.serve")

Reply = TypeVar("Reply")

CONTROL_CPUS = 0.1  # of ingress, router and leaders: they ask Ray for little
FAILURE_POLL_S = 0.25
FLUSH_S = 0.5  # what a failed engine still says reaches its clients


class Engine:
    """One group: a leader in this process, its ranks in actors beside it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, group: str, config: EngineConfig, resources: RankResources, drain_s: float
    ) -> None:
        self._drain_s = drain_s
        self._actors = RankActors(config, resources)
        self._leader = EngineLeader(config, self._actors.executor)
        self._service = EngineService(self._leader, EngineMeters(RayMeterFactory(), group))
        await self._service.start()
        self._guard = asyncio.create_task(self._exit_on_failure())

    async def submit(self, request: EngineRequest, epoch: str) -> None | Failure:
        return await outcome(self._service.submit(request, epoch))

    async def abort(self, request_ids: list[str]) -> int | Failure:
        return await outcome(self._service.abort(request_ids))

    async def outputs(
        self, client_id: str
    ) -> AsyncGenerator[StreamOpened | list[SequenceDelta], None]:
        stream = self._service.outputs(client_id)
        try:
            async for message in stream:
                yield message
        finally:
            await stream.aclose()

    async def extend(self, request_ids: list[str], lease: LeaseTerms) -> None | Failure:
        return await outcome(self._service.extend(request_ids, lease))

    async def report(self, pages_after: int) -> tuple[EngineReport, PageChanges] | Failure:
        return await outcome(self._service.report(pages_after))

    async def check_health(self) -> None:
        self._service.check_health()

    async def _exit_on_failure(self) -> None:
        """A group that lost a rank is built anew: Serve replaces a replica that is gone."""
        while self._leader.failed is None:
            await asyncio.sleep(FAILURE_POLL_S)
        logger.error("the engine failed and its replica exits: %s", self._leader.failed)
        await asyncio.sleep(FLUSH_S)
        os._exit(1)

    async def __del__(self) -> None:
        self._guard.cancel()
        await self._service.drain(self._drain_s)
        await self._service.stop()
        await self._actors.close()


class Router:
    """The one router."""

    def __init__(self, engines: Mapping[str, DeploymentHandle[Any]], config: ClusterConfig) -> None:
        clients = {group: ServeEngineClient(handle) for group, handle in engines.items()}
        settings = RouterConfig(
            queue_limit=config.router.max_queued,
            lease_ttl_s=config.router.lease_ttl_s,
            tenants=config.router.policies(),
        )
        self._service = RouterService(
            clients,
            settings,
            RouterMeters(RayMeterFactory()),
            report_period_s=config.router.report_period_s,
        )
        self._following = asyncio.create_task(self._service.follow())

    async def place(
        self, request: PlaceRequest, ticket: str, supersede: bool
    ) -> Placement | Failure:
        return await outcome(self._service.place(request, ticket=ticket, supersede=supersede))

    async def begun(self, lease_id: str) -> None | Failure:
        return await outcome(self._service.begun(lease_id))

    async def grow(
        self, lease_id: str, request: PlaceRequest, output_tokens: int
    ) -> Growth | None | Failure:
        return await outcome(self._service.grow(lease_id, request, output_tokens))

    async def release(self, lease_id: str, output_tokens: int | None) -> None | Failure:
        return await outcome(self._service.release(lease_id, output_tokens))

    async def abort(self, request_id: str) -> bool | Failure:
        return await outcome(self._service.abort(request_id))

    async def withdraw(self, request_id: str, ticket: str) -> None | Failure:
        return await outcome(self._service.withdraw(request_id, ticket))

    async def estimate(self, request: PlaceRequest) -> Estimate | Failure:
        return await outcome(self._service.estimate(request))

    async def explain(self, request_id: str) -> tuple[Explained, ...] | Failure:
        return await outcome(self._service.explain(request_id))

    async def suspect(self, group: str, epoch: str) -> None | Failure:
        return await outcome(self._service.suspect(group, epoch))

    async def status(self, fresh: bool) -> ClusterStatus | Failure:
        return await outcome(self._service.status(fresh=fresh))

    async def drain(self) -> None:
        await self._service.drain()

    async def check_health(self) -> None:
        if self._following.done():
            raise RuntimeError("the router no longer follows its engines")


class Ingress:
    """The gRPC methods of one ingress process."""

    def __init__(
        self,
        router: DeploymentHandle[Any],
        engines: Mapping[str, DeploymentHandle[Any]],
        keys: list[tuple[str, str]] | None,
        config: ClusterConfig,
    ) -> None:
        files = resolve_model(config.model)
        self._meters = IngressMeters(RayMeterFactory())
        self._drain_s = config.timeouts.drain_s
        self._service = IngressService(
            ServeRouterClient(router),
            {group: ServeEngineClient(handle) for group, handle in engines.items()},
            ModelCodec(files.path),
            Authenticator(keys),
            limits_of(config),
            self._meters,
            name=serve.get_replica_context().replica_id.unique_id,
            version=package_version(),
            model_names=frozenset({config.model, files.name}),
            queue_timeout_s=config.router.queue_timeout_s,
        )
        self._following = asyncio.create_task(self._service.follow())

    async def Generate(
        self, request: object, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        call = self._service.generate(request, grpc_context.invocation_metadata())
        return await self._answer("Generate", request, grpc_context, call, pb.GenerateResponse())

    async def GenerateStream(
        self, request: object, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        events = self._service.generate_stream(request, grpc_context.invocation_metadata())
        result = "cancelled"
        try:
            async for event in events:
                yield event
            result = "ok"
        except Exception as error:
            # The code is set and the stream ends without raising: behind HAProxy
            # the status arrives whole that way, trailers included.
            result = fail(grpc_context, error, request)
        finally:
            self._meters.request("GenerateStream", result)
            await events.aclose()

    async def Tokenize(
        self, request: object, grpc_context: RayServegRPCContext
    ) -> pb.TokenizeResponse:
        call = self._service.tokenize(request, grpc_context.invocation_metadata())
        return await self._answer("Tokenize", request, grpc_context, call, pb.TokenizeResponse())

    async def Abort(self, request: object, grpc_context: RayServegRPCContext) -> pb.AbortResponse:
        call = self._service.abort(request, grpc_context.invocation_metadata())
        return await self._answer("Abort", request, grpc_context, call, pb.AbortResponse())

    async def EstimateBudget(
        self, request: object, grpc_context: RayServegRPCContext
    ) -> pb.EstimateBudgetResponse:
        call = self._service.estimate_budget(request, grpc_context.invocation_metadata())
        return await self._answer(
            "EstimateBudget", request, grpc_context, call, pb.EstimateBudgetResponse()
        )

    async def Explain(
        self, request: object, grpc_context: RayServegRPCContext
    ) -> pb.ExplainResponse:
        call = self._service.explain(request, grpc_context.invocation_metadata())
        return await self._answer("Explain", request, grpc_context, call, pb.ExplainResponse())

    async def GetModelInfo(
        self, request: object, grpc_context: RayServegRPCContext
    ) -> pb.GetModelInfoResponse:
        call = self._service.get_model_info(request, grpc_context.invocation_metadata())
        return await self._answer(
            "GetModelInfo", request, grpc_context, call, pb.GetModelInfoResponse()
        )

    async def GetLoads(
        self, request: object, grpc_context: RayServegRPCContext
    ) -> pb.GetLoadsResponse:
        call = self._service.get_loads(request, grpc_context.invocation_metadata())
        return await self._answer("GetLoads", request, grpc_context, call, pb.GetLoadsResponse())

    # grpc.health.v1.Health; needs no key, as probes have none.

    async def Check(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=self._health())

    async def Watch(
        self, request: health_pb2.HealthCheckRequest
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        last = None
        while True:
            status = self._health()
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(1.0)

    def _health(self) -> int:
        if self._service.ready:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING

    async def check_health(self) -> None:
        if self._following.done():
            raise RuntimeError("the ingress no longer follows the router")

    async def _answer(
        self,
        method: str,
        request: object,
        context: RayServegRPCContext,
        call: Awaitable[Reply],
        empty: Reply,
    ) -> Reply:
        result = "cancelled"
        try:
            reply = await call
            result = "ok"
        except Exception as error:
            result = fail(context, error, request)
            return empty
        finally:
            self._meters.request(method, result)
        return reply

    async def __del__(self) -> None:
        self._following.cancel()
        await self._service.drain(self._drain_s)
        await self._service.stop()


def fail(context: RayServegRPCContext, error: Exception, request: object) -> str:
    """Put an error into a call's status and log what clients must not see; its metrics label."""
    request_id = str(getattr(request, "request_id", ""))[:MAX_ID_CHARS]
    if errors.is_expected(error):
        logger.info("refused request %r: %s", request_id, error)
    else:
        logger.error("failed at request %r", request_id, exc_info=error)
    wire = errors.to_wire(error, request_id)
    context.set_code(errors.status_code(wire))
    context.set_details(encode_details(wire))
    # Serve's annotation knows text alone; a key that ends in -bin takes bytes.
    trailers: list[Any] = [(TRAILER, encode_trailer(wire))]
    context.set_trailing_metadata(trailers)
    return errors.reason_label(wire)


def limits_of(config: ClusterConfig) -> Limits:
    return Limits(
        max_request_bytes=config.ingress.max_request_bytes,
        max_stop_strings=config.ingress.max_stop_strings,
        max_stop_chars=config.ingress.max_stop_chars,
        max_choices=config.ingress.max_choices,
        default_max_tokens=config.ingress.default_max_tokens,
        default_timeout_s=config.timeouts.request_s,
    )


def package_version() -> str:
    try:
        return version("kvmesh")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


def group_names(config: ClusterConfig) -> list[str]:
    return [f"engine-{index}" for index in range(config.groups)]


def build_app(
    config: ClusterConfig, keys: list[tuple[str, str]] | None, *, gpus_per_rank: float
) -> serve.Application:
    """The application, with one deployment for each group, so that a handle is a group.

    keys: (sha256, tenant) of the API keys let in, None for everybody
    """
    engine_config = config.engine_config()
    resources = RankResources(config.engine.cpus_per_rank, gpus_per_rank)
    health = {"health_check_period_s": config.timeouts.health_period_s}
    stop = {"graceful_shutdown_timeout_s": config.timeouts.drain_s + 10}
    engines = {
        group: _deployment(
            Engine,
            name=group,
            num_replicas=1,
            max_ongoing_requests=100_000,
            ray_actor_options={"num_cpus": CONTROL_CPUS},
            placement_group_bundles=[
                {"CPU": CONTROL_CPUS},
                *(resources.bundle() for _ in range(engine_config.tp)),
            ],
            placement_group_strategy="STRICT_PACK",
            **health,
            **stop,
        ).bind(group, engine_config, resources, config.timeouts.drain_s)
        for group in group_names(config)
    }
    router = _deployment(
        Router,
        name="router",
        num_replicas=1,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": CONTROL_CPUS},
        **health,
    ).bind(engines, config)
    ingress = _deployment(
        Ingress,
        name="ingress",
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=config.ingress.max_streams,
        ray_actor_options={"num_cpus": CONTROL_CPUS},
        **health,
        **stop,
    )
    app: serve.Application = ingress.bind(router, engines, keys, config)
    return app


def _deployment(cls: type, **options: Any) -> Any:
    # Serve's annotations know the decorator, not this call of it.
    return serve.deployment(cls, **options)
