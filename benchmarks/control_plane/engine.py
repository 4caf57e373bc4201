"""The application's engine over ranks that have no model.

Everything else of a group is real: leader, engine, scheduler, pages, leases.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

from benchmarks.control_plane.executor import InstantExecutor
from kvmesh.cluster import app
from kvmesh.workers.config import EngineConfig


class InstantRanks:
    """Replaces RankActors, whose arguments were others in older checkouts."""

    def __init__(self, *arguments: object) -> None:
        (config,) = (each for each in arguments if isinstance(each, EngineConfig))
        self.executor = InstantExecutor(config)
        made.append(self.executor)

    async def close(self) -> None:
        self.executor.close()

    def kill(self) -> None:
        """There are no processes."""


made: list[InstantExecutor] = []
# Its name in older checkouts, which are measured as baselines.
NAME = "EngineReplica" if hasattr(app, "EngineReplica") else "Engine"
_Replica: Any = getattr(app, NAME)


class InstantEngine(_Replica):  # type: ignore[misc]
    """The engine deployment over an InstantExecutor."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        app.RankActors = InstantRanks  # type: ignore[attr-defined,assignment]
        await super().__init__(*args, **kwargs)

    async def executor_facts(self) -> dict[str, int]:
        """The leader's threads, and the executor's work and CPU time so far."""
        executor = made[-1]
        return {
            "pid": os.getpid(),
            "engine_thread": executor.thread_id,
            "loop_thread": threading.get_native_id(),
            "executor_ns": executor.cpu_ns,
            "tokens": executor.num_tokens,
            "steps": executor.steps,
        }


def build(args: dict[str, Any]) -> Any:
    """The application's builder, with the engine without a model."""
    setattr(app, NAME, InstantEngine)
    return app.build(args)


def install() -> None:
    """Have clusters deploy the engine without a model. Idempotent."""
    setattr(app, NAME, InstantEngine)  # older checkouts build the application in this process
    with contextlib.suppress(ImportError):
        from kvmesh.cluster import serve_config

        serve_config.BUILDER = f"{__name__}:build"  # type: ignore[misc]
