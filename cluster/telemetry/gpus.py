"""Utilisation and memory of a group's GPUs, by NVML."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What NVML says of a GPU; None for what it does not, as of the utilization of a part (MIG).

    utilization: share of the last moment in which a kernel ran, 0 to 1
    """

    utilization: float | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None


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

    uuids: as NVML writes them. Those that it does not know have a GpuUse that says nothing
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._handles: list[tuple[str, Any]] = []
        self._warned: set[tuple[str, str]] = set()
        if not any(uuids):
            return
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            logger.warning("no metrics of GPUs: %s", error)
            return
        self._handles = [
            (uuid, self._ask("nvmlDeviceGetHandleByUUID", uuid, uuid)) for uuid in uuids
        ]

    def read(self) -> list[GpuUse]:
        """One for each rank, none without NVML; takes about a millisecond."""
        return [self._use(uuid, handle) for uuid, handle in self._handles]

    def _use(self, uuid: str, handle: Any) -> GpuUse:
        if handle is None:
            return GpuUse()
        rates = self._ask("nvmlDeviceGetUtilizationRates", uuid, handle)
        memory = self._ask("nvmlDeviceGetMemoryInfo", uuid, handle)
        return GpuUse(
            None if rates is None else rates.gpu / 100,
            None if memory is None else memory.used,
            None if memory is None else memory.free,
        )

    def _ask(self, call: str, uuid: str, argument: Any) -> Any:
        """None for what NVML does not say, which is logged once."""
        try:
            return getattr(self._nvml, call)(argument)
        except self._nvml.NVMLError as error:
            if (call, uuid) not in self._warned:
                self._warned.add((call, uuid))
                logger.warning("some metrics of GPU %s are missing: %s: %s", uuid, call, error)
            return None
