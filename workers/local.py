"""Ranks without Ray: one in this process, or several in child processes.

For programs that run without Ray: `kvmesh.LLM` and `kvmesh run`, benchmarks, evaluation, tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

from kvmesh.workers.channel import ChannelExecutor
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import WorkerDiedError
from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.rank import Rank
from kvmesh.workers.rank_steps import RankSteps
from kvmesh.workers.threads import wait_passively
from kvmesh.workers.worker import worker_main

CLOSE_TIMEOUT_S = 10.0


class InProcessExecutor:
    """The rank of a group that has only one, called directly.

    On a CPU a step is computed when it is submitted, so there is nothing to hide behind it; on a
    GPU it is launched.
    """

    num_ranks = 1

    def __init__(self, config: EngineConfig) -> None:
        assert config.ranks == 1, "several ranks need LocalProcesses"
        self._rank: Rank | None = Rank(config, 0, Communicator.single())
        self.max_in_flight = 2 if self._rank.runs_ahead else 1
        self._steps: RankSteps | None = None

    @property
    def rank(self) -> Rank:
        assert self._rank is not None, "it is closed"
        return self._rank

    def describe(self) -> list[RankDescription]:
        return [self.rank.describe()]

    def divergences(self, kv_formats: list[str]) -> list[float]:
        return self.rank.divergences(kv_formats)

    def allocate(self, allocation: Allocation) -> None:
        self.rank.allocate(allocation)
        self._steps = RankSteps(self.rank.runner, samples=True)

    def submit(self, plan: StepPlan) -> None:
        assert self._steps is not None, "allocate comes before the first step"
        self._steps.submit(plan)

    def result(self, masks: MakeMasks | None = None) -> StepResult:
        assert self._steps is not None, "allocate comes before the first step"
        if masks is not None:
            self._steps.mask(masks())
        result = self._steps.result()
        assert result is not None
        return result

    def close(self) -> None:
        """Let weights and pages go, even if something still refers to this."""
        self._rank = self._steps = None


class LocalProcesses(ChannelExecutor):
    """A group's ranks as child processes of this one.

    Started as programs of their own and not with multiprocessing, whose children run the main
    module again: here a script needs no `if __name__ == "__main__"`, and may come from stdin or
    a notebook.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config.ranks, step_timeout_s=config.step_timeout_s)
        # The same modules, however this process has found them.
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        wait_passively(environ)
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, endpoint in enumerate(self.endpoints):
            words = [config.model_dump_json(), rank, endpoint, str(self.rendezvous)]
            process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()", json.dumps(words)],
                stdin=subprocess.DEVNULL,
                env=environ,
            )
            self._processes.append(process)
            Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        self.fail(WorkerDiedError(f"rank {rank} ended with exit code {code}"))

    def close(self) -> None:
        super().close()
        for process in self._processes:
            try:
                process.wait(timeout=CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    """A rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent
    settings, rank, endpoint, rendezvous = json.loads(sys.argv[1])
    config = EngineConfig.model_validate_json(settings)
    worker_main(config, rank, endpoint, Path(rendezvous))


def local_executor(config: EngineConfig) -> InProcessExecutor | LocalProcesses:
    """The executor for this machine: in this process if there is only one rank."""
    return InProcessExecutor(config) if config.ranks == 1 else LocalProcesses(config)
