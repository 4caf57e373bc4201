"""A rank as a Ray actor: the only file of the data plane that imports Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.threads import wait_passively
from kvmesh.workers.without_triton import leave_out_triton


@ray.remote(max_restarts=0)
class RankActor:
    """One rank's process. It ends with its leader: Ray kills the actors of a dead owner."""

    def process_id(self) -> int:
        """Call it before `run`, which does not return."""
        return os.getpid()

    def run(self, config: EngineConfig, rank: int, endpoint: str, rendezvous: Path) -> None:
        """Serve until the leader closes the channel; see worker_main."""
        wait_passively(os.environ)
        leave_out_triton(config.device)
        # Imported here so that the leader can load the class without torch.
        from kvmesh.workers.worker import worker_main

        worker_main(config, rank, endpoint, rendezvous)


def rank_actor(**options: Any) -> Any:
    """The actor class with Ray's resource and placement options."""
    return RankActor.options(**options)  # type: ignore[attr-defined]
