"""Ranks without Ray: one in this process, or several in child processes.

For programs that run without Ray: benchmarks, evaluation, tests.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from threading import Thread

from kvmesh.workers.channel import ChannelExecutor
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import WorkerDiedError
from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.rank import Rank
from kvmesh.workers.threads import wait_passively
from kvmesh.workers.worker import worker_main


class InProcessExecutor:
    """The single rank of a group with tp = 1, called directly."""

    num_ranks = 1

    def __init__(self, config: EngineConfig) -> None:
        assert config.tp == 1, "tp > 1 needs LocalProcesses"
        self._rank = Rank(config, 0, Communicator.single())

    def describe(self) -> list[RankDescription]:
        return [self._rank.describe()]

    def divergences(self, kv_formats: list[str]) -> list[float]:
        return self._rank.divergences(kv_formats)

    def allocate(self, allocation: Allocation) -> None:
        self._rank.allocate(allocation)

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        result = self._rank.execute(plan, masks)
        assert result is not None
        return result

    def close(self) -> None:
        """Does nothing: there is nothing to close."""


class LocalProcesses(ChannelExecutor):
    """A group's ranks as child processes of this one."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config.tp, step_timeout_s=config.step_timeout_s)
        context = multiprocessing.get_context("spawn")
        wait_passively(os.environ)  # the ranks inherit the environment
        self._processes: list[BaseProcess] = []
        for rank, endpoint in enumerate(self.endpoints):
            process = context.Process(
                target=worker_main,
                args=(config, rank, endpoint, self.rendezvous),
                name=f"kvmesh-rank-{rank}",
                daemon=True,
            )
            process.start()
            self._processes.append(process)
            Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: BaseProcess) -> None:
        process.join()
        self.fail(WorkerDiedError(f"rank {rank} ended with exit code {process.exitcode}"))

    def close(self) -> None:
        super().close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def local_executor(config: EngineConfig) -> InProcessExecutor | LocalProcesses:
    """The executor for this machine: in this process if there is only one rank."""
    return InProcessExecutor(config) if config.tp == 1 else LocalProcesses(config)
