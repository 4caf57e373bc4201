"""What `auto` is on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.cluster.config import ClusterConfig, EngineSection
from kvmesh.workers.quantities import AUTO


def autos_here(
    config: ClusterConfig, gpu_memory: Sequence[int]
) -> dict[tuple[str, ...], str | int | bool]:
    """By path, what the engines' settings are that are `auto`.

    gpu_memory: bytes of each GPU
    """
    sections: dict[tuple[str, ...], EngineSection] = {("engine",): config.engine}
    if not isinstance(config.groups, int):
        for index, engine in enumerate(config.group_engines().values()):
            sections["groups", str(index)] = engine
    return {
        (*path, name): value
        for path, engine in sections.items()
        for name, value in _values(engine, gpu_memory).items()
        if getattr(engine, name) == AUTO
    }


def _values(engine: EngineSection, gpu_memory: Sequence[int]) -> dict[str, str | int | bool]:
    device = engine.device
    if device == AUTO:
        device = "cuda" if gpu_memory else "cpu"
    limits = engine.limits(device, min(gpu_memory, default=0))
    return {
        "device": device,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "cuda_graphs": limits.cuda_graphs,
    }
