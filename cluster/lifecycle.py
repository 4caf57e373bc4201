"""Starting and stopping a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kvmesh.cluster import deployment
from kvmesh.cluster.auto_layout import gpus_by_type, with_layout
from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.drain import RouterCalls, RouterContact
from kvmesh.cluster.environment import serve_variables
from kvmesh.cluster.errors import RayDiedError
from kvmesh.cluster.joining import join_ray
from kvmesh.cluster.keys import local_key
from kvmesh.cluster.link import LinkError
from kvmesh.cluster.local_ray import LocalRay, check_ray_sends_tokens, import_ray, muted
from kvmesh.cluster.memory_check import check_memory
from kvmesh.cluster.ports import Port, PortBlock, take_ports
from kvmesh.cluster.readiness import until_running, until_serving
from kvmesh.cluster.resources import alive, check_devices, check_layouts, check_nodes, logical_cpus
from kvmesh.cluster.serve_config import (
    APP_NAME,
    STOP_S,
    anywhere,
    behind_proxy,
    for_nodes,
    serve_config,
)
from kvmesh.cluster.telemetry.gpus import local_gpu_memory
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.source import resolve_model

logger = logging.getLogger(__name__)

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to connect to a cluster.

    target, http_url: of gRPC, and of OpenAI's API
    api_key: the local key; None if keys are configured by their hashes, or none is needed
    metrics_url: None if Ray was already running
    dashboard_url: Ray's dashboard, None without one
    """

    target: str
    http_url: str
    api_key: str | None
    metrics_url: str | None
    dashboard_url: str | None = None


class Cluster:
    """A context manager that starts a cluster and stops it again, with all its processes.

    config: with `ray.address`, only kvmesh's application is started and stopped, in
        that Ray cluster
    progress: called with the current step, and the share of it that is done if known
    """

    def __init__(self, config: ClusterConfig, progress: Progress | None = None) -> None:
        self._config = config
        self._progress = progress or _silent
        self._model = Path()  # where its files are, once it has been found
        self._local: LocalRay | None = None
        self._dashboard_url: str | None = None
        self._router: RouterContact | None = None
        self._router_calls: RouterCalls | None = None
        self._started = False
        self._deployed = False  # or about to be: until then there is nothing of ours in Serve
        self._hurry = threading.Event()

    def __enter__(self) -> Endpoint:
        return self.start_guarded()

    def start_guarded(self) -> Endpoint:
        """Like `start`, but stops everything again if it fails."""
        try:
            return self.start()
        except BaseException:
            self._hurry.set()
            self.stop()
            raise

    def report_to(self, progress: Progress) -> None:
        """Report further steps to another `progress`."""
        self._progress = progress

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def hurry(self) -> None:
        """Stop without waiting for requests. Safe to call from any thread, but from no signal's
        handler, which may have interrupted the one that holds the lock."""
        self._hurry.set()

    def start(self) -> Endpoint:
        """Raises ConfigError for an invalid setting, StartError for any other failure."""
        config = self._prepare()
        metrics_url = self._start_ray(config)
        self._deploy(config)
        self._router_calls = RouterCalls(APP_NAME)
        self._find_router()
        host = "127.0.0.1" if config.ingress.host == "0.0.0.0" else config.ingress.host
        target = f"{host}:{config.ingress.port}"
        http_url = f"http://{host}:{config.ingress.http_port}"
        self._progress("waiting for the first report", None)
        for _ in until_serving(target, config.ingress.replicas, config.timeouts.start_s):
            self.check_alive()
        # As they were given: the settings that are deployed have the key by its hash.
        key = local_key(self._config.auth, os.environ)
        return Endpoint(target, http_url, key, metrics_url, self._dashboard_url)

    def _prepare(self) -> ClusterConfig:
        """Check and download what is possible before anything runs, and choose free ports."""
        config = self._config
        if config.ray.address is None:
            check_ray_sends_tokens()
        files = resolve_model(config.model, progress=self._progress)
        self._model = files.path
        facts = read_facts(files.path)
        if config.layout.mode == "given":
            check_layouts(config, facts)
        if config.ray.address is None:
            gpus = local_gpu_memory(os.environ)
            check_devices(config, len(gpus))
            config = with_layout(config, files.path, [gpus] if gpus else [])
            check_layouts(config, facts)
            check_nodes(config, [{"CPU": logical_cpus(config), "GPU": len(gpus)}])
            check_memory(config, facts, has_gpus=bool(gpus))
            chosen = {
                "ingress.port": config.ingress.port,
                "ingress.http_port": config.ingress.http_port,
                "metrics.port": config.metrics.port,
            }
            chosen = {setting: port for setting, port in chosen.items() if port}
            ports = take_ports(config.ingress.host, chosen)
            self._local = LocalRay(ports)
            config = _with_ports(config, ports)
        else:
            config = for_nodes(config)
        return anywhere(config, os.environ)

    def _start_ray(self, config: ClusterConfig) -> str | None:
        self._progress("starting Ray", None)
        if self._local is None:
            assert config.ray.address is not None
            os.environ.update(serve_variables(config))
            self._dashboard_url = _dashboard_url(join_ray(config.ray.address))
            self._started = True
            return None
        self._started = True
        self._dashboard_url = _dashboard_url(self._local.start(config))
        return f"http://127.0.0.1:{config.metrics.port}/metrics"

    def check_alive(self) -> None:
        """Raises RayDiedError when the cluster has to be stopped and started again."""
        if (name := self._dead_part()) is not None:
            raise RayDiedError(
                f"{name}, a process of Ray, has died, so the cluster was stopped. Start it again; "
                "if this recurs, see whether the machine runs out of memory"
            )

    def _dead_part(self) -> str | None:
        return None if self._local is None else self._local.dead_part()

    def _deploy(self, config: ClusterConfig) -> None:
        ray = import_ray()
        nodes = alive(ray.nodes())
        if config.layout.mode == "auto":  # on nodes of others, which are known only now
            config = with_layout(config, self._model, gpus_by_type(nodes))
        check_nodes(config, nodes)
        self._progress("starting Serve", None)
        local = self._local is not None
        serve = serve_config(behind_proxy(config) if local else config)
        if not local:
            deployment.check_running(serve)
        self._deployed = True
        deployment.submit(serve)
        for waiting in until_running(config.timeouts.start_s):
            self.check_alive()
            self._progress(f"loading the model, {waiting}", None)

    def stop(self) -> None:
        """Wait for requests, shut down, and end all processes. Idempotent.

        Whatever a step raises, the others are taken.
        """
        try:
            if self._started:
                self._started = False
                self._shut_down()
        finally:
            if self._local is not None:
                self._local.release()
                self._local = None

    def _shut_down(self) -> None:
        ray = import_ray()
        try:
            if ray.is_initialized() and not self._hurry.is_set():
                self._progress("shutting down", None)
                self._wait_for_requests()
            self._progress("stopping Ray", None)
        finally:
            left = self._end(ray)
        if left is not None:
            logger.warning("the Ray cluster at %s %s", self._config.ray.address, left)

    def _end(self, ray: Any) -> str | None:
        """What is left of the application in a Ray cluster that was joined, in words."""
        with muted(), contextlib.ExitStack() as last_one_first:
            then = last_one_first.callback
            # Not before the others are gone: it waits for a dead part.
            then(ray.shutdown)
            if self._local is not None:
                then(self._local.end)
            dead = self._dead_part() is not None
            if not dead:
                if self._local is not None:
                    then(self._local.stop)
                then(ray.shutdown)
            if self._router_calls is not None:
                self._router_calls.close()
            if dead:
                return None
            # Without a connection, Serve would make one, maybe to another Ray cluster.
            return self._stop_serving() if self._deployed and ray.is_initialized() else None

    def _stop_serving(self) -> str | None:
        """See `_end`."""
        if self._config.ray.address is None:
            from ray import serve

            with contextlib.suppress(Exception):  # the processes are ended anyway
                serve.shutdown()
            return None
        try:
            if deployment.withdraw(self._config.timeouts.drain_s + STOP_S, self._hurry):
                return None
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            return f"may still run the application, which could not be withdrawn: {words}"
        return "is still ending the application, for which this process does not wait any longer"

    def _wait_for_requests(self) -> None:
        if self._router_calls is None:
            return  # it has not started
        if self._dead_part() is None:
            self._find_router()
        if self._router is None:
            return

        def report(live_requests: int) -> None:
            self._progress(f"waiting for {live_requests} requests", None)

        try:
            self._router_calls.drain(
                self._router, self._config.timeouts.drain_s, self._hurry, report
            )
        except TimeoutError:
            logger.warning("cannot wait for running requests: the router does not answer")

    def _find_router(self) -> None:
        """Note where the router listens, while Serve can tell."""
        try:
            assert self._router_calls is not None
            self._router = self._router_calls.contact()
        except LinkError as error:
            logger.warning("%s", error)


def _dashboard_url(context: Any) -> str | None:
    """context: what ray.init returns"""
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def _with_ports(config: ClusterConfig, ports: PortBlock) -> ClusterConfig:
    """The configuration with each port 0 replaced by a free one."""
    ingress = config.ingress.model_copy(
        update={
            "port": config.ingress.port or ports[Port.GRPC],
            "http_port": config.ingress.http_port or ports[Port.HTTP],
        }
    )
    metrics = config.metrics.model_copy(update={"port": config.metrics.port or ports[Port.METRICS]})
    return config.model_copy(update={"ingress": ingress, "metrics": metrics})


def _silent(step: str, share: float | None) -> None:
    """Report nothing."""
