"""The ranks of one group as actors in the bundles of its leader's placement group."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from dataclasses import dataclass

import psutil
import ray
from ray.exceptions import RayError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvmesh.workers.actor import rank_actor
from kvmesh.workers.channel import ChannelExecutor
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import WorkerDiedError

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RankResources:
    """What Ray reserves for one rank."""

    cpus: float
    gpus: float


class RankActors:
    """Starts a group's ranks and watches them; `executor` exchanges messages with them.

    For replicas whose placement group has one bundle for each rank after their own.

    group: the ranks are named after it
    start_timeout_s: a rank that has not loaded by then counts as hung
    """

    def __init__(
        self, group: str, config: EngineConfig, resources: RankResources, start_timeout_s: float
    ) -> None:
        self.executor = ChannelExecutor(
            config.ranks, step_timeout_s=config.step_timeout_s, start_timeout_s=start_timeout_s
        )
        bundles = get_current_placement_group()
        assert bundles is not None, "the leader must run in a placement group"
        self._actors = []
        self._processes: list[psutil.Process] = []
        self._watchers = []
        for rank, endpoint in enumerate(self.executor.endpoints):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=bundles, placement_group_bundle_index=rank + 1
            )
            actor = rank_actor(
                # As Ray's dashboard shows it. Ranks of the engine before may not be gone yet.
                name=f"kvmesh {group} rank {rank} {uuid.uuid4().hex[:8]}",
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                scheduling_strategy=strategy,
            ).remote()
            self._actors.append(actor)
            process_id = actor.process_id.remote()
            running = actor.run.remote(config, rank, endpoint, self.executor.rendezvous)
            self._watchers.append(asyncio.create_task(self._watch(rank, process_id, running)))

    async def _watch(
        self, rank: int, process_id: ray.ObjectRef[int], running: ray.ObjectRef[None]
    ) -> None:
        """Fail the executor when a rank ends, for whatever reason."""
        try:
            self._processes.append(psutil.Process(await process_id))
            await running
            error = WorkerDiedError(f"rank {rank} ended")
        except (RayError, psutil.NoSuchProcess) as cause:
            logger.warning("rank %d died: %s", rank, cause)
            error = WorkerDiedError(f"rank {rank} died")
        self.executor.fail(error)

    async def close(self) -> None:
        """Wait up to CLOSE_TIMEOUT_S for the ranks to end, then kill the others."""
        await asyncio.wait(self._watchers, timeout=CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the ranks at once, also those that hang and do not hear Ray."""
        for watcher in self._watchers:
            watcher.cancel()
        # They run on this host: their placement is STRICT_PACK.
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for actor in self._actors:
            ray.kill(actor)
