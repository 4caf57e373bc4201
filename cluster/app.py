"""The Serve application: ingress replicas, one router, one deployment for each group.

The classes here are what Serve calls; each delegates to an object that knows no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from kvmesh.cluster import grpc_front, http_front
from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.config import build as build_config
from kvmesh.cluster.draining_nodes import follow_draining_nodes
from kvmesh.cluster.engine_service import EngineService
from kvmesh.cluster.group_scaler import GroupScaler, ScalingError
from kvmesh.cluster.grpc_front import GrpcFront
from kvmesh.cluster.http_front import HttpFront
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress.authenticate import Authenticator
from kvmesh.cluster.keys import follow_keys, known_keys, metered_tenants
from kvmesh.cluster.link import Address, LinkError, listen
from kvmesh.cluster.make_ingress import limits_of, make_ingress
from kvmesh.cluster.messages import TO_ROUTER
from kvmesh.cluster.processes import settle
from kvmesh.cluster.rank_actors import RankActors, RankResources
from kvmesh.cluster.reception import Reception
from kvmesh.cluster.resources import CONTROL_CPUS, bundles, gpus_per_rank
from kvmesh.cluster.router_finder import router_finder
from kvmesh.cluster.router_service import RouterService
from kvmesh.cluster.routing.autoscaling import AutoscalingPolicy
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.serve_config import STOP_S
from kvmesh.cluster.serve_replicas import replicas_wanted, set_replicas
from kvmesh.cluster.telemetry.logs import use_serve_log
from kvmesh.cluster.telemetry.meters import EngineMeters, IngressMeters, RouterMeters
from kvmesh.cluster.telemetry.ray_meters import ray_meter
from kvmesh.cluster.version import package_version
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.hub import pinned

logger = logging.getLogger("ray.serve")

Reply = TypeVar("Reply")

FAILURE_POLL_S = 0.25
HEALTH_TIMEOUT_S = 5.0  # Serve replaces a process that misses three health checks in a row
FLUSH_S = 0.5  # time for a failed engine's last messages to reach its clients
LIVE_POLL_S = 0.1
LOG_LINES = {"encoding": "JSON", "enable_access_log": False}
# Of a group: it runs, or the router says whether it does. Only what Serve scales begins with none.
ALWAYS: dict[str, Any] = {"num_replicas": 1}
AT_TIMES: dict[str, Any] = {
    "autoscaling_config": {
        "min_replicas": 0,
        "initial_replicas": 0,
        "max_replicas": 1,
        "policy": {"policy_function": "kvmesh.cluster.replica_policy:keep"},
    }
}


@dataclass(frozen=True, slots=True)
class Deployed:
    """What every process of a deployment receives."""

    config: ClusterConfig
    identity: Identity


class EngineReplica:
    """One group: a leader in this process, its ranks in actors next to it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        group: str,
        config: EngineConfig,
        resources: RankResources,
        router: DeploymentHandle[Any],
        deployed: Deployed,
    ) -> None:
        use_serve_log(group)
        self._drain_s = deployed.config.timeouts.drain_s
        self._actors = RankActors(group, config, resources, deployed.config.timeouts.start_s)
        self._service = EngineService(
            group,
            config,
            self._actors.executor,
            EngineMeters(ray_meter, group),
            deployed.identity,
            router_finder(router),
            host=node_ip(),
            node=node_id(),
            report_period_s=deployed.config.router.report_period_s,
        )
        try:
            await self._service.start()
        except BaseException:
            self._actors.kill()
            raise
        self._guard = asyncio.create_task(self._exit_on_failure())
        settle()

    async def check_health(self) -> None:
        self._service.check_health()

    async def _exit_on_failure(self) -> None:
        """Exit when a rank is lost: Serve then starts a new replica, with new ranks."""
        while (failed := self._service.leader.failed) is None:
            await asyncio.sleep(FAILURE_POLL_S)
        logger.error("the engine failed and its replica exits: %s", failed)
        try:
            self._actors.kill()
            await asyncio.sleep(FLUSH_S)
        finally:
            os._exit(1)

    async def __del__(self) -> None:
        self._guard.cancel()
        await self._service.drain(self._drain_s)
        await self._service.stop()
        await self._actors.close()


class RouterReplica:
    """The one router."""

    async def __init__(self, deployed: Deployed) -> None:  # type: ignore[misc]  # Serve awaits it
        use_serve_log()
        config = deployed.config
        if config.layout.reason is not None:
            logger.info("layout: %s", config.layout.reason)
        self._identity = deployed.identity
        self._drain_s = config.timeouts.drain_s
        settings = RouterConfig(
            queue_limit=config.router.max_queued,
            lease_ttl_s=config.router.lease_ttl_s,
            tenants=config.router.policies(),
        )
        meters = RouterMeters(ray_meter, metered_tenants(config.auth, config.metrics.tenants))
        own = serve.get_replica_context()
        groups = list(config.group_engines())
        running = await groups_running(own.app_name, config)
        self._service = RouterService(
            settings,
            meters,
            groups=running,
            configured=groups,
            divergence_nats=config.ingress.kv_divergence_nats,
        )
        self._listener = await listen(node_ip(), deployed.identity, TO_ROUTER, self._service.accept)
        self._find_router = router_finder(serve.get_deployment_handle(own.deployment, own.app_name))
        self._tasks = [
            asyncio.create_task(self._service.run()),
            asyncio.create_task(follow_draining_nodes(self._service.groups.nodes_leave)),
        ]
        scaling = config.autoscaling
        if scaling.min_groups is not None:
            policy = AutoscalingPolicy(
                scaling.min_groups, scaling.wait_s, scaling.up_after_s, scaling.down_after_s
            )
            scale = partial(set_replicas, own.app_name)
            scaler = GroupScaler(self._service, policy, groups, running, scale)
            self._tasks.append(asyncio.create_task(scaler.run()))
        settle()

    async def address(self) -> Address:
        """The address that engines and ingresses connect to."""
        return self._listener.address

    async def identity(self) -> Identity:
        """For the program that deployed it, which connects to it directly when it stops."""
        return self._identity

    async def check_health(self) -> None:
        if any(task.done() for task in self._tasks):
            raise RuntimeError("a task of the router has stopped")

    async def __del__(self) -> None:
        """Stay while requests run, because they may still need more pages.

        But not on a node that drains, once Serve has started another router: it rebuilds the
        ledger from what engines say, and this one would only refuse requests.
        """
        clock, *others = self._tasks
        for task in others:
            task.cancel()
        if node_id() in self._service.groups.leaving_nodes and await self._has_successor():
            return
        self._service.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                while self._service.status().router.live_requests:
                    await asyncio.sleep(LIVE_POLL_S)
        clock.cancel()
        self._listener.close()

    async def _has_successor(self) -> bool:
        try:
            return await self._find_router() != self._listener.address
        except LinkError:
            return False


class IngressReplica:
    """One ingress process; grpc_front.py and http_front.py serve its calls."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        router: DeploymentHandle[Any],
        engines: Mapping[str, DeploymentHandle[Any]],
        deployed: Deployed,
    ) -> None:
        """engines: bound only to make them part of the application"""
        use_serve_log()
        config = deployed.config
        meters = IngressMeters(ray_meter, metered_tenants(config.auth, config.metrics.tenants))
        limits = limits_of(config)
        self._drain_s = config.timeouts.drain_s
        self._service, self._codec = make_ingress(
            config, deployed.identity, router_finder(router), meters, limits
        )
        authenticator = Authenticator(known_keys(config.auth))
        self._keys = asyncio.create_task(follow_keys(config.auth, authenticator, meters.keys))
        reception = Reception(
            authenticator.authenticate,
            config.ingress.max_streams,
            shared=lambda: authenticator.several_tenants,
        )
        grpc_front.attach(GrpcFront(self._service, reception, limits, meters))
        self._http = HttpFront(
            self._service,
            package_version(),
            reception,
            limits,
            meters,
            config.ingress.allowed_origins,
        )
        http_front.attach(self._http)
        self._service.start()
        settle()

    def __serve_build_asgi_app__(self) -> HttpFront:
        """What Serve calls for a request over HTTP."""
        return self._http

    async def check_health(self) -> None:
        self._service.check_health()

    async def __del__(self) -> None:
        self._keys.cancel()
        await self._service.drain(self._drain_s)
        await self._service.stop()
        self._codec.close()


async def groups_running(app_name: str, config: ClusterConfig) -> frozenset[str]:
    """Those that Serve runs, or is to run: after a router's end, what it had decided."""
    if config.autoscaling.min_groups is None:
        return frozenset(config.group_engines())
    first = frozenset(config.first_groups())
    try:
        replicas = await replicas_wanted(app_name)
    except ScalingError as error:
        logger.warning("cannot ask Serve which groups run: %s", error)
        return first
    return first | {group for group in config.group_engines() if replicas.get(group)}


def node_ip() -> str:
    """This node's address in the Ray cluster."""
    return str(ray.util.get_node_ip_address())


def node_id() -> str:
    """This node's, in hexadecimal."""
    return ray.get_runtime_context().get_node_id()


def build(args: dict[str, Any]) -> serve.Application:
    """The application; Serve calls it with `args` of its configuration (serve_config.py).

    args: the settings, as in a file of `kvmesh serve --config`
    It has one deployment for each group, so that a handle is a group. Every call makes a new
    identity for all processes, so that a deployment accepts no process of a former one. A model on
    the hub is pinned to its commit of now.
    Raises ConfigError naming the setting, also if no keys are configured and some are needed.
    """
    config = build_config(args)
    auth = config.auth
    if auth.mode == "api_key" and not auth.keys and auth.key_directory is None:
        raise ConfigError(
            "auth.keys",
            "must have a key, or auth.key_directory be set: none is generated on a cluster",
        )
    if config.layout.mode == "auto":
        raise ConfigError(
            "layout.mode",
            "is auto, which only `kvmesh serve` resolves: set engine.tp, engine.kvp and groups, as "
            "`kvmesh plan` recommends them",
        )
    config = config.model_copy(update={"model": pinned(config.model)})
    deployed = Deployed(config, Identity.make())
    health = {
        "health_check_period_s": config.timeouts.health_period_s,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
    }
    stop = {"graceful_shutdown_timeout_s": config.timeouts.drain_s + STOP_S}
    router = _deployment(
        RouterReplica,
        name="router",
        num_replicas=1,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": CONTROL_CPUS},
        **health,
        **stop,
    ).bind(deployed)
    engines, first = {}, config.first_groups()
    for group, engine in config.group_engines().items():
        gpus = gpus_per_rank(engine, ray.cluster_resources())
        resources = RankResources(engine.cpus_per_rank, gpus)
        engines[group] = _deployment(
            EngineReplica,
            name=group,
            **(ALWAYS if group in first else AT_TIMES),
            ray_actor_options={"num_cpus": CONTROL_CPUS},
            placement_group_bundles=bundles(engine, gpus),
            placement_group_strategy="STRICT_PACK",
            **health,
            **stop,
        ).bind(group, config.engine_config(group), resources, router, deployed)
    ingress = _deployment(
        serve.ingress()(IngressReplica),
        name="ingress",
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=config.ingress.max_streams,
        ray_actor_options={"num_cpus": CONTROL_CPUS},
        **health,
        **stop,
    )
    app: serve.Application = ingress.bind(router, engines, deployed)
    return app


def _deployment(cls: type, **options: Any) -> Any:
    # Serve's annotations know the decorator, not this call of it.
    return serve.deployment(cls, logging_config=LOG_LINES, **options)
