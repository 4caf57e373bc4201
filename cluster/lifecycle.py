"""Starting and stopping a cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import psutil

from kvmesh.cluster.config import ClusterConfig, EngineSection
from kvmesh.cluster.drain import RouterCalls
from kvmesh.cluster.environment import local_variables, serve_variables
from kvmesh.cluster.errors import RayDiedError, StartError
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.keys import known_keys, local_key, protect_ray_token
from kvmesh.cluster.link import Address, LinkError
from kvmesh.cluster.ports import PortBlock, take_ports
from kvmesh.cluster.processes import (
    adopt_orphans,
    children_named,
    descendants,
    end_descendants,
    is_dead,
)
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.source import resolve_model

if TYPE_CHECKING:
    from ray import serve

logger = logging.getLogger(__name__)

APP_NAME = "kvmesh"
GCS_LOG_LINES = 10
POLL_S = 0.2
# What runs continues without them, but nothing that dies is replaced.
RAY_PROCESSES = ("gcs_server", "raylet")

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to connect to a cluster.

    api_key: the local key; None if keys are configured by their hashes, or none is needed
    metrics_url: None if Ray was already running
    dashboard_url: Ray's dashboard, None without one
    """

    target: str
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
        self._directory: Path | None = None
        self._ports: PortBlock | None = None
        self._environ: dict[str, str | None] = {}  # what its variables were before
        self._keep: frozenset[int] = frozenset()
        self._identity = Identity.make()
        self._dashboard_url: str | None = None
        self._router: Address | None = None
        self._router_calls: RouterCalls | None = None
        self._ray_processes: dict[str, psutil.Process] = {}
        self._started = False
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
        """Stop without waiting for requests. Safe to call from a signal handler."""
        self._hurry.set()

    def start(self) -> Endpoint:
        """Raises ConfigError for an invalid setting, StartError for any other failure."""
        config = self._prepare()
        metrics_url = self._start_ray(config)
        self._deploy(config)
        self._router_calls = RouterCalls(APP_NAME, self._identity)
        self._find_router()
        host = "127.0.0.1" if config.ingress.host in ("0.0.0.0", "::") else config.ingress.host
        target = f"{host}:{config.ingress.port}"
        self._wait_serving(target)
        key = local_key(config.auth, os.environ)
        return Endpoint(target, key, metrics_url, self._dashboard_url)

    def _prepare(self) -> ClusterConfig:
        """Check and download what is possible before anything runs, and choose free ports."""
        config = self._config
        files = resolve_model(config.model, progress=self._progress)
        facts = read_facts(files.path)
        _check_layouts(config, facts.num_kv_heads)
        if config.ray.address is None:
            chosen = {
                "ingress.port": config.ingress.port,
                "ingress.http_port": config.ingress.http_port,
                "metrics.port": config.metrics.port,
            }
            chosen = {setting: port for setting, port in chosen.items() if port}
            self._ports = take_ports(config.ingress.host, chosen)
            config = _with_ports(config, *map(self._ports.single, (4, 5, 6)))
        self._keys = known_keys(config.auth, os.environ)
        return config

    def _start_ray(self, config: ClusterConfig) -> str | None:
        self._progress("starting Ray", None)
        self._keep = descendants()
        if config.ray.address is not None:
            os.environ.update(serve_variables(config))
            joined = _import_ray().init(
                address=config.ray.address, logging_level="ERROR", log_to_driver=False
            )
            self._note_dashboard(joined)
            self._started = True
            return None
        adopt_orphans()
        # Its path must be short, because Unix sockets of Ray and HAProxy are placed in it.
        self._directory = Path(tempfile.mkdtemp(prefix="kvmesh-", dir=_short_tmp()))
        assert self._ports is not None
        protect_ray_token(os.environ)
        variables = local_variables(config, self._directory / "p", self._ports)
        self._environ = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        self._started = True
        ray = _import_ray()
        scratch = self._directory / "t"
        scratch.mkdir()
        try:
            with _temporary_directory(scratch):
                started = ray.init(
                    num_cpus=_logical_cpus(config),
                    object_store_memory=config.ray.object_store_bytes,
                    include_dashboard=config.ray.dashboard,
                    logging_level="ERROR",
                    log_to_driver=False,
                    _temp_dir=str(self._directory / "ray"),
                    _metrics_export_port=config.metrics.port,
                    _node_ip_address="127.0.0.1",
                )
        except (RuntimeError, OSError, ValueError) as error:
            raise StartError(f"Ray did not start: {error}{self._gcs_words()}") from error
        self._note_dashboard(started)
        self._ray_processes = children_named(RAY_PROCESSES)
        return f"http://127.0.0.1:{config.metrics.port}/metrics"

    def _note_dashboard(self, context: Any) -> None:
        """context: what ray.init returns"""
        if context.dashboard_url:
            self._dashboard_url = f"http://{context.dashboard_url}"

    def _gcs_words(self) -> str:
        """The end of the log of Ray's GCS, which `stop` deletes."""
        assert self._directory is not None
        lines = [
            line
            for path in sorted(self._directory.glob("ray/session_latest/logs/gcs_server.*"))
            for line in path.read_text(errors="replace").splitlines()[-GCS_LOG_LINES:]
        ]
        return "\n".join(["; the log of its GCS ends with:", *lines]) if lines else ""

    def check_alive(self) -> None:
        """Raises RayDiedError when the cluster has to be stopped and started again."""
        if (name := self._dead_part()) is not None:
            raise RayDiedError(
                f"{name}, a process of Ray, has died, so the cluster was stopped. Start it again; "
                "if this recurs, see whether the machine runs out of memory"
            )

    def _dead_part(self) -> str | None:
        """Ray's process that has died, if one has."""
        return next((name for name, x in self._ray_processes.items() if is_dead(x)), None)

    def _deploy(self, config: ClusterConfig) -> None:
        self._progress("starting Serve", None)
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.config import HTTPOptions, gRPCOptions

        from kvmesh.cluster.app import build_app

        _quieten_serve()
        try:
            serve.start(
                http_options=HTTPOptions(host=config.ingress.host, port=config.ingress.http_port),
                grpc_options=gRPCOptions(
                    port=config.ingress.port,
                    grpc_servicer_functions=["kvmesh.cluster.grpc_front.add_to_server"],
                ),
            )
        except (RayError, RuntimeError, TimeoutError, ValueError) as error:
            raise StartError(f"Serve did not start: {_last_error(str(error))}") from error
        _quieten_serve()
        app = build_app(config, self._keys, self._identity, gpus_per_rank=_gpus_per_rank(config))
        self._run(serve, app, config.timeouts.start_s)

    def _run(self, serve: Any, app: serve.Application, timeout_s: float) -> None:
        """Deploy and wait, and report which deployments are not ready yet."""
        failures: list[BaseException] = []

        def run() -> None:
            try:
                serve.run(app, name=APP_NAME, route_prefix="/")
            except BaseException as error:
                failures.append(error)

        # In a thread, so that this one can report progress and handle signals.
        runner = threading.Thread(target=run, name="kvmesh-deploy", daemon=True)
        runner.start()
        deadline = time.monotonic() + timeout_s
        while runner.is_alive():
            runner.join(POLL_S)
            self.check_alive()
            if time.monotonic() > deadline:
                raise StartError(
                    f"not ready within {timeout_s:g} s (timeouts.start_s); {_unready(serve)}"
                )
            if runner.is_alive():
                self._progress(f"loading the model, {_unready(serve)}", None)
        if failures:
            raise StartError(_deploy_failure(serve, failures[0])) from failures[0]

    def _wait_serving(self, target: str) -> None:
        """Wait until health checks through the proxy return SERVING, from every ingress.

        The proxy gives consecutive calls to one ingress after the other.
        """
        self._progress("waiting for the first report", None)
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        deadline = time.monotonic() + self._config.timeouts.start_s
        in_a_row = 0
        with grpc.insecure_channel(target) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                with contextlib.suppress(grpc.RpcError):
                    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        in_a_row += 1
                        if in_a_row > self._config.ingress.replicas:
                            return
                        continue
                in_a_row = 0
                self.check_alive()
                time.sleep(POLL_S)
        raise StartError("the cluster was deployed, but its health check does not return SERVING")

    def stop(self) -> None:
        """Wait for requests, shut down, and end all processes. Idempotent."""
        if self._started:
            self._started = False
            self._shut_down()
        if self._ports is not None:
            self._ports.release()
            self._ports = None
        for name, value in self._environ.items():
            # They are this cluster's: neither another one nor a child process may have them.
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environ = {}

    def _shut_down(self) -> None:
        ray = _import_ray()
        try:
            if ray.is_initialized() and not self._hurry.is_set():
                self._progress("shutting down", None)
                self._wait_for_requests()
        finally:
            self._progress("stopping Ray", None)
            if self._router_calls is not None:
                self._router_calls.close()
            with _muted():
                if self._dead_part() is None:
                    self._stop_serving()
                    ray.shutdown()
                if self._directory is not None:
                    end_descendants(self._keep)
                    shutil.rmtree(self._directory, ignore_errors=True)
                    self._directory = None
                # Not before the others are gone: it waits for a dead part.
                ray.shutdown()

    def _stop_serving(self) -> None:
        """Errors do not matter, because the processes are ended anyway."""
        from ray import serve

        with contextlib.suppress(Exception):
            if self._config.ray.address is None:
                serve.shutdown()
            else:
                serve.delete(APP_NAME)

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
            self._router = self._router_calls.address()
        except LinkError as error:
            logger.warning("%s", error)


def _with_ports(
    config: ClusterConfig, grpc_port: int, http_port: int, metrics_port: int
) -> ClusterConfig:
    """The configuration with each port 0 replaced by a free one."""
    ingress = config.ingress.model_copy(
        update={
            "port": config.ingress.port or grpc_port,
            "http_port": config.ingress.http_port or http_port,
        }
    )
    metrics = config.metrics.model_copy(update={"port": config.metrics.port or metrics_port})
    return config.model_copy(update={"ingress": ingress, "metrics": metrics})


def _check_layouts(config: ClusterConfig, num_kv_heads: int) -> None:
    """Raises ConfigError unless each group's tp divides the model's KV heads."""
    for setting, engine in _engines_by_setting(config).items():
        if num_kv_heads % engine.tp:
            divisors = [str(n) for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
            raise ConfigError(
                f"{setting}.tp",
                f"must divide the model's {num_kv_heads} KV heads: one of "
                f"{', '.join(divisors)}; got {engine.tp}",
            )


def _engines_by_setting(config: ClusterConfig) -> dict[str, EngineSection]:
    """The engines that differ, by the path at which they are configured."""
    if isinstance(config.groups, int):
        return {"engine": config.engine}
    return {f"groups.{i}": e for i, e in enumerate(config.group_engines().values())}


def _logical_cpus(config: ClusterConfig) -> int:
    """The machine's CPUs; more if the groups ask for more, which then share the machine's."""
    from kvmesh.cluster.app import CONTROL_CPUS

    engines = config.group_engines().values()
    needed = sum(CONTROL_CPUS + engine.tp * engine.cpus_per_rank for engine in engines)
    needed += CONTROL_CPUS * (config.ingress.replicas + 1)
    return max(os.cpu_count() or 1, math.ceil(needed) + 1)


def _gpus_per_rank(config: ClusterConfig) -> dict[str, float]:
    """By group, 1 if its ranks run on GPUs, by the setting or the cluster's resources; else 0."""
    engines = config.group_engines()
    gpus = 0.0
    if any(engine.device != "cpu" for engine in engines.values()):
        gpus = _import_ray().cluster_resources().get("GPU", 0.0)
    on_gpus = {
        group: engine.device == "cuda" or (engine.device == "auto" and gpus > 0)
        for group, engine in engines.items()
    }
    needed = sum(engine.tp for group, engine in engines.items() if on_gpus[group])
    if needed > gpus:
        raise ConfigError(
            "groups",
            f"need {needed} GPUs (the sum of their tp), but the cluster has {gpus:g}",
        )
    return {group: float(on_gpu) for group, on_gpu in on_gpus.items()}


def _unready(serve: Any) -> str:
    """Which deployments are not ready yet, for users."""
    with contextlib.suppress(Exception):  # a progress message must not fail the start
        app = serve.status().applications.get(APP_NAME)
        if app is not None:
            waiting = [n for n, d in app.deployments.items() if d.status != "HEALTHY"]
            return f"waiting for {', '.join(sorted(waiting))}" if waiting else "almost ready"
    return "waiting for Serve"


def _deploy_failure(serve: Any, error: BaseException) -> str:
    """The reason from Serve's status: the last error of the first failed deployment."""
    with contextlib.suppress(Exception):
        for name, deployment in serve.status().applications[APP_NAME].deployments.items():
            if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY") and deployment.message:
                return f"{name} did not start: {_last_error(deployment.message)}"
    return f"the application did not start: {error}"


def _last_error(trace: str) -> str:
    """The last line of a traceback that names an error."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no reason was given"])[-1]


def _import_ray() -> Any:
    """Import Ray late, because it reads the environment when it is imported."""
    import ray

    return ray


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Hide what Ray prints about the deaths of its actors during shutdown, also from C++."""
    kept: dict[int, int] = {}
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it was closed before we started
            kept[stream] = os.dup(stream)
    try:
        with open(os.devnull, "w") as null:
            for stream in kept:
                os.dup2(null.fileno(), stream)
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)


def _quieten_serve() -> None:
    """Hide what Serve logs here: errors that matter are raised, or in its status."""
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)


def _short_tmp() -> str:
    """The temporary directory, or /tmp if its path is too long for sockets in it.

    HAProxy accepts paths of up to 97 characters, and Serve adds 57 of them.
    """
    chosen = tempfile.gettempdir()
    return chosen if len(chosen) <= 12 or not os.access("/tmp", os.W_OK) else "/tmp"


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Iterator[None]:
    """Set TMPDIR for processes started meanwhile, so that their files go with the cluster."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def _silent(step: str, share: float | None) -> None:
    """Report nothing."""
