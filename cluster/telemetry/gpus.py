"""Utilisation and memory of a group's GPUs, by NVML."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuUse:
    """utilization: share of the last moment in which a kernel ran, 0 to 1"""

    utilization: float
    used_bytes: int
    free_bytes: int


def local_gpu_memory() -> list[int]:
    """The memory in bytes of each of this machine's GPUs; none without NVML.

    As NVML counts them: what CUDA_VISIBLE_DEVICES hides is not left out.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # no driver, so no GPU that could be used
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]


class Gpus:
    """The GPUs of a group's ranks, in their order.

    uuids: as NVML writes them; those that it does not know are left out, all without NVML
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._handles: list[Any] = []
        if not any(uuids):
            return
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        except pynvml.NVMLError as error:
            logger.warning("no metrics of GPUs: %s", error)

    def read(self) -> list[GpuUse]:
        """One for each rank; takes about a millisecond."""
        uses = []
        for handle in self._handles:
            try:
                share = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except self._nvml.NVMLError as error:
                logger.warning("no metrics of GPUs any more: %s", error)
                self._handles = []
                return []
            uses.append(GpuUse(share, memory.used, memory.free))
        return uses
