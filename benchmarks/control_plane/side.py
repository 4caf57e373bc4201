"""Starts one cluster, measures it and stops it.

    python -m benchmarks.control_plane.side OUTPUT [--ingress N] [--seconds S]

Measures the `kvmesh` that the import path finds, and assumes that it has
  cluster.lifecycle.Cluster, Endpoint; Cluster calls `progress` before it imports
      cluster.app, with Serve's variables in the environment; its application is APP_NAME
  cluster.config.build with the sections `engine`, `ingress`, `router` and `timeouts` below
  cluster.app.EngineReplica (formerly Engine), which makes RankActors(config, resources) and
      uses its `executor` and `close`
  workers.executor, workers.plan: the Executor protocol and its plans
  group 0 as a Serve deployment named `engine-0`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
import time
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.control_plane.costs import split_costs
from benchmarks.control_plane.load import Load, LoadProcess, Outcome
from benchmarks.control_plane.processes import (
    KINDS,
    ClusterProcesses,
    CpuTimes,
    Spent,
    spent_between,
)
from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.lifecycle import Cluster, Endpoint

T = TypeVar("T")
APP_NAME = "kvmesh"

GROUP = "engine-0"
IDLE_S = 5.0
HANDLE_TIMEOUT_S = 60.0
TOKENS = 256
SHORT_TOKENS = 1
STEP_MS = 20


def phases(seconds: float) -> dict[str, Load]:
    """By name, in order. `short` and `64` together separate the cost of tokens and of requests."""
    return {
        "idle": Load(streams=1, tokens=2, seconds=seconds / 2),
        "64": Load(streams=64, tokens=TOKENS, seconds=seconds),
        "short": Load(streams=64, tokens=SHORT_TOKENS, seconds=seconds),
        "256": Load(streams=256, tokens=TOKENS, seconds=seconds, health=True),
        "64_paced": Load(streams=64, tokens=TOKENS, step_ms=STEP_MS, seconds=seconds),
        "256_paced": Load(
            streams=256, tokens=TOKENS, step_ms=STEP_MS, seconds=seconds, health=True
        ),
    }


def configure(ingress: int) -> ClusterConfig:
    """Room for 256 streams of 256 tokens at a time, with pages to spare."""
    return build(
        {
            "ingress": {"port": 0, "http_port": 0, "replicas": ingress},
            "router": {"max_queued": 1024},
            "timeouts": {"drain_s": 5.0},
            "engine": {
                "tp": 1,
                "max_num_seqs": 512,
                "max_num_batched_tokens": 8192,
                "kv_memory_bytes": "64MiB",
                "kv_probe": "off",
                "cpus_per_rank": 0.1,
            },
        }
    )


def install_engine(step: str, share: float | None) -> None:
    """A `progress` of Cluster: replaces the engine once Serve's variables are set.

    Serve reads them when it is imported, which the import here does.
    """
    if "RAY_SERVE_ENABLE_HA_PROXY" in os.environ:
        from benchmarks.control_plane import engine

        engine.install()


class HandleLoop:
    """An event loop that runs all the time, in a thread: Serve's handles need one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(HANDLE_TIMEOUT_S)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class Side:
    """Measures a cluster that runs."""

    def __init__(self, load: LoadProcess, loop: HandleLoop) -> None:
        self._load = load
        self._loop = loop
        self._processes = ClusterProcesses(frozenset({load.pid}))
        self._facts = self._executor_facts()

    def measure(self, phases: dict[str, Load]) -> dict[str, Any]:
        idle_cores = self._idle_cores()
        figures = {name: self._phase(load) for name, load in phases.items()}
        return {
            "idle_cores": idle_cores,
            "phases": figures,
            "per_request_us": self._per_request(figures),
            "memory_bytes": self._processes.memory_bytes(),
            "processes": self._processes.counts(),
        }

    def _idle_cores(self) -> dict[str, float]:
        """Share of a core that each kind of process uses when idle."""
        before = self._processes.cpu_times()
        time.sleep(IDLE_S)
        spent = spent_between(before, self._processes.cpu_times())
        return {kind: spent.by_kind[kind] / IDLE_S for kind in KINDS}

    def _phase(self, load: Load) -> dict[str, Any]:
        snapshots: list[CpuTimes] = []

        def snapshot() -> None:
            snapshots.append(self._processes.cpu_times())

        outcome = self._load.run(load, snapshot, snapshot)
        before, self._facts = self._facts, self._executor_facts()
        spent = spent_between(*snapshots)
        return {
            **{name: value for name, value in asdict(outcome).items() if value is not None},
            "tokens_per_s": outcome.tokens / outcome.seconds,
            "tokens_per_message": outcome.tokens / outcome.messages,
            "tokens_per_step": _ratio(self._facts, before, "tokens", "steps"),
            "executor_us_per_token": _ratio(self._facts, before, "executor_ns", "tokens") / 1e3,
            "cpu_us_per_token": self._per_token(spent, outcome),
            "cores_of_others": self._others(spent, outcome),
        }

    def _per_token(self, spent: Spent, outcome: Outcome) -> dict[str, float]:
        parts = {kind: spent.by_kind[kind] for kind in KINDS}
        for part in ("engine", "loop"):
            parts[f"leader_{part}"] = spent.by_thread[self._facts[f"{part}_thread"]]
        return {part: seconds / outcome.tokens * 1e6 for part, seconds in parts.items()}

    def _others(self, spent: Spent, outcome: Outcome) -> float:
        """Cores that were used by neither the cluster nor the load."""
        ours = sum(spent.by_kind.values()) + outcome.client_cpu_s
        return (spent.busy - ours) / outcome.seconds

    def _per_request(self, figures: dict[str, Any]) -> dict[str, float]:
        short, long = figures["short"], figures["64"]
        tokens_per_request = short["tokens"] / short["requests"]
        return {
            kind: split_costs(
                long["cpu_us_per_token"][kind],
                TOKENS,
                short["cpu_us_per_token"][kind] * tokens_per_request,
                SHORT_TOKENS,
            )[1]
            for kind in long["cpu_us_per_token"]
        }

    def _executor_facts(self) -> dict[str, int]:
        async def ask() -> dict[str, int]:
            from ray import serve

            handle: Any = serve.get_deployment_handle(GROUP, APP_NAME)
            return dict(await handle.executor_facts.remote())

        return self._loop.run(ask())


def _ratio(after: dict[str, int], before: dict[str, int], over: str, under: str) -> float:
    return (after[over] - before[over]) / (after[under] - before[under])


def run(ingress: int, seconds: float) -> dict[str, Any]:
    """All figures of one cluster."""
    load = LoadProcess()
    try:
        began_s = time.perf_counter()
        with Cluster(configure(ingress), install_engine) as endpoint:
            start_s = time.perf_counter() - began_s
            return {"start_s": start_s, **_measure(load, endpoint, seconds)}
    finally:
        load.stop()


def _measure(load: LoadProcess, endpoint: Endpoint, seconds: float) -> dict[str, Any]:
    load.connect(endpoint.target, endpoint.api_key)
    loop = HandleLoop()
    try:
        return Side(load, loop).measure(phases(seconds))
    finally:
        loop.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--ingress", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    figures = run(arguments.ingress, arguments.seconds)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
