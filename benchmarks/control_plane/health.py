"""Health checks at a fixed rate from a process of their own, as probes have one.

    python -m benchmarks.control_plane.health TARGET

In the process of the load, they would wait for its streams as well. It says when the first check
was answered; at the end of its input it prints when each was sent and how long its answer took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PERIOD_S = 0.05
TIMEOUT_S = 300.0


class HealthProbe:
    """The process, from the load's side."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, target: str) -> HealthProbe:
        """Wait until the first check is answered."""
        command = (sys.executable, "-m", "benchmarks.control_plane.health", target)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        assert process.stdout is not None
        if not await process.stdout.readline():
            raise RuntimeError("no health check was answered")
        return cls(process)

    async def end(self, opened_s: float, closed_s: float) -> list[float]:
        """How long checks took that were sent in between; times as of time.perf_counter.

        Raises RuntimeError if one failed.
        """
        printed, _ = await self._process.communicate(b"")  # which ends its input
        if self._process.returncode != 0:
            raise RuntimeError("a health check failed")
        found = json.loads(printed)
        return [taken_s for sent_s, taken_s in found if opened_s <= sent_s < closed_s]


async def probe(target: str) -> list[tuple[float, float]]:
    """Sends checks, whether or not the last one was answered."""
    health: Any = health_pb2_grpc.HealthStub(grpc.aio.insecure_channel(target))
    found: list[tuple[float, float]] = []

    async def ask() -> None:
        sent_s = time.perf_counter()
        reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise ValueError(f"the health service answered {reply.status}, expected SERVING")
        found.append((sent_s, time.perf_counter() - sent_s))

    await ask()
    print("the first check was answered", flush=True)
    over = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    async with asyncio.TaskGroup() as group:
        while not over.done():
            group.create_task(ask())
            await asyncio.sleep(PERIOD_S)
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(probe(sys.argv[1]))))
