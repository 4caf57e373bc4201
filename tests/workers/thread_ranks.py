"""A group's ranks as threads of one process: the real ranks, without starting processes.

Every rank computes with its own weights, pages and tables; only what they tell one another goes
through a list instead of shared memory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription, StepByStep
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.rank import Rank
from kvmesh.workers.rank_steps import RankSteps


class ThreadCommunicator(Communicator):
    """board: where each rank puts what the others read, in two places in turn"""

    def __init__(self, rank: int, size: int, kvp: int, board: list[list[torch.Tensor]]) -> None:
        self.rank, self.size, self.kvp = rank, size, kvp
        self._board = board
        self._turn = 0
        self.barriers: Barrier | None = None

    def _tell(self, part: torch.Tensor) -> list[torch.Tensor]:
        """What every rank tells, in rank order."""
        assert self.barriers is not None
        self._turn ^= 1
        self._board[self._turn][self.rank] = part.clone()
        self.barriers.wait(timeout=300)
        return list(self._board[self._turn])

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._tell(tensor)
        assert all(part.shape == tensor.shape for part in parts)
        return tensor.copy_(sum(parts[1:], parts[0].clone()))

    def broadcast(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self._tell(tensor)[0])

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._tell(part), dim=-1)

    def gather_logits(self, part: torch.Tensor) -> torch.Tensor | None:
        joined = self.all_gather(part)
        return joined if self.rank == 0 else None

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        first = self.tp_rank * self.kvp
        theirs = self._tell(parts)[first : first + self.kvp]
        return torch.stack([part[self.kvp_rank] for part in theirs])


def thread_communicators(size: int, kvp: int) -> list[ThreadCommunicator]:
    """Of the ranks of one group, each of which is to be used by a thread of its own."""
    board = [[torch.empty(0)] * size for _ in range(2)]
    comms = [ThreadCommunicator(rank, size, kvp, board) for rank in range(size)]
    barriers = Barrier(size)
    for comm in comms:
        comm.barriers = barriers
    return comms


class ThreadRanks(StepByStep):
    """All ranks take each call at the same time, as processes do."""

    max_in_flight = 2

    def __init__(self, config: EngineConfig) -> None:
        super().__init__()
        self.num_ranks = config.ranks
        self._threads = ThreadPoolExecutor(self.num_ranks)
        comms = thread_communicators(config.ranks, config.kvp)
        self.ranks = [Rank(config, comm.rank, comm) for comm in comms]

    def describe(self) -> list[RankDescription]:
        return [rank.describe() for rank in self.ranks]

    def divergences(self, kv_formats: list[str]) -> list[float]:
        found = [self._threads.submit(rank.divergences, kv_formats) for rank in self.ranks]
        return found[0].result()

    def allocate(self, allocation: Allocation) -> None:
        list(self._threads.map(lambda rank: rank.allocate(allocation), self.ranks))

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        def step(rank: Rank) -> StepResult | None:
            steps = RankSteps(rank.runner, samples=rank.samples)
            steps.submit(plan)
            if masks is not None and rank.samples:
                steps.mask(masks())
            return steps.result()

        found = [self._threads.submit(step, rank) for rank in self.ranks]
        result, *others = [x.result() for x in found]
        assert result is not None and others == [None] * len(others)
        return result

    def close(self) -> None:
        self._threads.shutdown()
