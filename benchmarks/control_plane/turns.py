"""How long an ingress's event loop is held up, in CPU time, which other work does not change.

    python -m benchmarks.control_plane.turns [--baseline CHECKOUT] [--streams N] [--seconds S]
                                             [--json FILE]

The path without Ray: router and engine in one process, an ingress with a gRPC server in another,
the load and its health checks in a third; all are real but the ranks (executor.py). A timer of
the ingress is due every 2 ms: the CPU time of its thread between two calls is what one turn of
the loop took, garbage collections included, and what a health check may have to wait for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import uvloop

from benchmarks.control_plane.__main__ import HERE, RESULTS, commit_of, conditions, environment_of
from benchmarks.control_plane.costs import rounded
from benchmarks.control_plane.executor import InstantExecutor
from benchmarks.control_plane.load import Load, LoadProcess
from benchmarks.control_plane.side import STEP_MS, TOKENS, configure
from kvmesh.cluster import grpc_front
from kvmesh.cluster.engine_service import EngineService
from kvmesh.cluster.grpc_front import GrpcFront
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress.authenticate import Caller
from kvmesh.cluster.ingress.codec import ModelCodec
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.link import Address, listen
from kvmesh.cluster.messages import TO_ROUTER
from kvmesh.cluster.processes import settle
from kvmesh.cluster.reception import Reception
from kvmesh.cluster.router_service import RouterService
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.telemetry.meters import EngineMeters, IngressMeters, RouterMeters
from kvmesh.cluster.telemetry.table import Metric
from kvmesh.workers.model.source import resolve_tokenizer

GROUP = "engine-0"
PERIOD_S = 0.002
CALLS = 4096
TIMEOUT_S = 300.0


class NoMeter:
    def __init__(self, metric: Metric) -> None: ...

    def record(self, value: float, labels: Any) -> None: ...


class Turns:
    """CPU times of the running event loop's turns."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds: list[float] = []
        self._before_s = time.thread_time()
        self._beat()

    def _beat(self) -> None:
        now_s = time.thread_time()
        self._seconds.append(now_s - self._before_s)
        self._before_s = now_s
        self._loop.call_later(PERIOD_S, self._beat)

    def take(self) -> dict[str, float]:
        """Of those since the last call: the longest, in seconds, and the 99th percentile."""
        ordered, self._seconds = sorted(self._seconds), []
        return {"max_s": ordered[-1], "p99_s": ordered[int(0.99 * (len(ordered) - 1))]}


async def serve_engine(pipe: Connection, identity: Identity) -> None:
    """Router and engine; sends the router's address."""
    service = RouterService(RouterConfig(queue_limit=1024), RouterMeters(NoMeter), groups=[GROUP])
    listener = await listen("127.0.0.1", identity, TO_ROUTER, service.accept)
    ticking = asyncio.create_task(service.run())

    async def find() -> Address:
        return listener.address

    config = configure(1).engine_config(GROUP)
    executor, meters = InstantExecutor(config), EngineMeters(NoMeter, GROUP)
    await EngineService(GROUP, config, executor, meters, identity, find).start()
    settle()
    pipe.send(listener.address)
    await ticking


async def serve_ingress(pipe: Connection, identity: Identity, router: Address) -> None:
    """Sends its port, and its turns whenever it is asked."""

    async def find() -> Address:
        return router

    path, _ = resolve_tokenizer(configure(1).model)
    limits, meters = Limits(), IngressMeters(NoMeter)
    service = IngressService(identity, find, ModelCodec(path), limits, meters, version="0")
    reception = Reception(lambda headers: Caller("tenant", admin=True), CALLS)
    grpc_front.attach(GrpcFront(service, reception, limits, meters))
    server = grpc.aio.server()
    grpc_front.add_to_server(None, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    service.start()
    while not service.ready:
        await asyncio.sleep(0.1)
    settle()
    pipe.send(port)
    turns = Turns()
    asked: asyncio.Queue[None] = asyncio.Queue()
    asyncio.get_running_loop().add_reader(pipe.fileno(), lambda: asked.put_nowait(pipe.recv()))
    while True:
        await asked.get()
        pipe.send(turns.take())


def run(serve: Any, pipe: Connection, *arguments: Any) -> None:
    work: Coroutine[Any, Any, None] = serve(pipe, *arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def measure(streams: int, seconds: float) -> dict[str, Any]:
    """Of the `kvmesh` that the import path finds, by phase."""
    context, identity = multiprocessing.get_context("spawn"), Identity.make()
    found: dict[str, Any] = {}
    load = LoadProcess()
    children = []

    def start(serve: Any, *arguments: Any) -> Connection:
        ours, theirs = context.Pipe()
        child = context.Process(target=run, args=(serve, theirs, *arguments), daemon=True)
        child.start()
        children.append(child)
        return ours

    try:
        ingress = start(serve_ingress, identity, start(serve_engine, identity).recv())
        load.connect(f"127.0.0.1:{ingress.recv()}", None)

        def take() -> dict[str, float]:
            ingress.send(None)
            turns: dict[str, float] = ingress.recv()
            return turns

        for name, step_ms in (("", 0), ("_paced", STEP_MS)):
            taken: list[dict[str, float]] = []
            phase = Load(streams, TOKENS, step_ms=step_ms, seconds=seconds, health=True)
            outcome = load.run(phase, lambda: taken.append(take()), lambda: taken.append(take()))  # noqa: B023
            found[f"{streams}{name}"] = {
                "turn_max_s": taken[1]["max_s"],
                "turn_p99_s": taken[1]["p99_s"],
                "tokens_per_s": outcome.tokens / outcome.seconds,
                "health_s": outcome.health_s,
                "health_max_s": outcome.health_max_s,
            }
    finally:
        load.stop()
        for child in children:
            child.terminate()
    return found


def measure_checkout(checkout: Path, streams: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as name:
        output = Path(name) / "turns.json"
        command = [sys.executable, "-m", "benchmarks.control_plane.turns", "--one", str(output)]
        command += ["--streams", str(streams), "--seconds", str(seconds)]
        environment = environment_of(checkout, Path(name), {"PATH": ""})
        subprocess.run(command, cwd=name, env=environment, timeout=TIMEOUT_S, check=True)
        figures: dict[str, Any] = json.loads(output.read_text())
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", type=Path, help="another checkout to compare with")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each phase")
    parser.add_argument("--json", type=Path, default=RESULTS.with_name("control_plane_turns.json"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        arguments.one.write_text(json.dumps(measure(arguments.streams, arguments.seconds)))
        return
    checkouts = {"this": HERE}
    if arguments.baseline is not None:
        checkouts["baseline"] = arguments.baseline.absolute()
    report = {
        **conditions(),
        "commits": {name: commit_of(checkout) for name, checkout in checkouts.items()},
        "seconds": arguments.seconds,
        "results": {
            name: rounded(measure_checkout(checkout, arguments.streams, arguments.seconds))
            for name, checkout in checkouts.items()
        },
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["results"], indent=1))


if __name__ == "__main__":
    main()
