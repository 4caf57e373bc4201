"""Utilisation and memory of a group's GPUs, by NVML."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
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


def local_gpu_memory(environ: Mapping[str, str]) -> list[int]:
    """The memory in bytes of each of this machine's GPUs that CUDA has; none without NVML.

    environ: CUDA_VISIBLE_DEVICES there, if set, names those of CUDA
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # no driver, so no GPU that could be used
    handles = list(map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())))
    if (names := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        handles = list(_visible(names, handles))
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]


def _visible(names: str, handles: Sequence[Any]) -> Iterator[Any]:
    """The GPUs that CUDA_VISIBLE_DEVICES names: by number, by the beginning of a UUID, or slices
    of one by theirs. As CUDA has it, those after a name that is not known are hidden."""
    import pynvml

    for name in map(str.strip, names.split(",")):
        if name.isdecimal():
            found = handles[int(name) : int(name) + 1]
        elif name.startswith("MIG-"):
            try:
                found = [pynvml.nvmlDeviceGetHandleByUUID(name)]
            except pynvml.NVMLError:
                return
        else:
            found = [x for x in handles if name and pynvml.nvmlDeviceGetUUID(x).startswith(name)]
        if len(found) != 1:
            return
        yield found[0]


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
