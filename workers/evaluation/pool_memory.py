"""Measures what a pool takes on this device, by allocating it."""

from __future__ import annotations

import gc

import psutil
import torch

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.evaluation.memory import MeasuredMemory, PlannedMemory
from kvmesh.workers.executor import Allocation
from kvmesh.workers.model.source import Progress, resolve_model
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.rank import Rank

# Of what is free, for what else starts on the machine.
USABLE_SHARE = 0.9


class PoolMeter:
    """Loads the model, and then allocates one pool after the other.

    config: of a single rank; its kv_format is not used
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        assert config.tp == 1, "one rank is measured in this process"
        resolve_model(config.model, progress=progress)
        self._page_size = config.page_size
        self._rank = Rank(config, 0, Communicator.single())
        self.on_gpu = self._rank.describe().device == "cuda"

    def measure(self, planned: PlannedMemory) -> MeasuredMemory | None:
        """None if the device has no room for the pool now."""
        gc.collect()
        if planned.figure.pool_bytes > USABLE_SHARE * self._free_bytes():
            return None
        before = self._held_bytes()
        rank = self._rank.with_format(planned.fmt.name)
        plan = planned.plan
        rank.allocate(
            Allocation(
                hot_pages=plan.hot_total,
                sealed_pages=plan.sealed_pages,
                max_rows=plan.max_num_seqs,
                max_pages_per_row=-(-planned.figure.tokens // self._page_size),
            ),
            prepare_decode=False,
        )
        rank.commit_pool()
        held = self._held_bytes()
        return MeasuredMemory(held - before, held)

    def _held_bytes(self) -> int:
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        return int(psutil.Process().memory_info().rss)

    def _free_bytes(self) -> int:
        if self.on_gpu:
            torch.cuda.empty_cache()
            return int(torch.cuda.mem_get_info()[0])
        return int(psutil.virtual_memory().available)
