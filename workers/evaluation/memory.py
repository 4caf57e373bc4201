"""How much memory sequences take, by KV format: predicted, with the engine's own arithmetic.

Torch-free; pool_memory.py measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.page_geometry import KVShape, geometry_of
from kvmesh.workers.pool_plan import PoolPlan, pool_for


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """What was allocated on this device.

    pool_bytes: how much the process grew with the pool
    process_bytes: all that it holds then, weights and libraries included; on a GPU what torch
        has allocated there
    """

    pool_bytes: int
    process_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryFigure:
    """The memory of a number of sequences in one format, over all ranks.

    sequence_bytes: what the router reserves for one, and the engine gives it
    pool_bytes: of all sequences, and of the tokens of the step in flight
    total_bytes: with the weights
    kv_memory_bytes, max_hot_share: the settings, of one rank, that give this pool
    measured: None if it was not
    """

    kv_format: str
    sequences: int
    tokens: int
    sequence_bytes: int
    pool_bytes: int
    total_bytes: int
    kv_memory_bytes: int
    max_hot_share: float
    measured: MeasuredMemory | None = None


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """A figure, and the pool that it is of."""

    figure: MemoryFigure
    fmt: KVFormat
    plan: PoolPlan


def predict(
    shape: KVShape,
    weight_bytes: int,
    formats: Sequence[KVFormat],
    batches: Sequence[int],
    tokens: int,
    *,
    itemsize: int,
    page_size: int,
    tp: int = 1,
    max_num_batched_tokens: int,
) -> Iterator[PlannedMemory]:
    """Every format with every number of sequences.

    itemsize: bytes of the compute dtype, which exact pages have
    Raises ValueError naming the format if it does not support the head_dim.
    """
    for fmt in formats:
        try:
            geometry = geometry_of(fmt, shape, page_size=page_size, itemsize=itemsize, tp=tp)
        except ValueError as error:
            raise ValueError(f"{fmt.name}: {error}") from None
        for sequences in batches:
            plan = pool_for(
                geometry,
                sequences=sequences,
                tokens=tokens,
                max_num_batched_tokens=max_num_batched_tokens,
            )
            pool = plan.num_bytes(geometry)
            figure = MemoryFigure(
                kv_format=fmt.name,
                sequences=sequences,
                tokens=tokens,
                sequence_bytes=geometry.bytes_of(geometry.peak_need(tokens), 1),
                pool_bytes=pool * tp,
                total_bytes=pool * tp + weight_bytes,
                kv_memory_bytes=pool,
                max_hot_share=plan.hot_share(geometry),
            )
            yield PlannedMemory(figure, fmt, plan)
