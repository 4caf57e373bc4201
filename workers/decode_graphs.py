"""Decode steps replayed from CUDA graphs, for batch sizes that are powers of two.

Each size has one graph for steps whose sequences share prefixes, if that is possible, and
one for other steps. A graph's inputs are fixed tensors: a step is padded to the next size,
copied into them with one transfer, and replayed. Lengths and block tables are read on the
device, so a graph stays valid as sequences grow, end and change rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvmesh.kernels.attention import SharedPrefixes
from kvmesh.workers.shared_prefixes import PrefixSets, num_starts
from kvmesh.workers.step import BlockTables, StepArrays, StepTensors

Forward = Callable[[StepTensors], torch.Tensor | None]

# Larger batches are limited by the device, not by launches.
_MAX_SIZE = 256


@dataclass(frozen=True, slots=True)
class _Graph:
    """staging: [n] int64 on the host, pinned; inputs: the same on the device."""

    graph: torch.cuda.CUDAGraph
    staging: torch.Tensor
    inputs: torch.Tensor
    logits: torch.Tensor | None


class DecodeGraphs:
    """Captures every size at construction; all ranks of a group capture in the same order.

    min_members: minimum number of sequences in a set of shared prefixes
    """

    def __init__(
        self,
        forward: Forward,
        tables: BlockTables,
        *,
        max_rows: int,
        max_seq_len: int,
        min_members: int,
    ) -> None:
        self._forward = forward
        self._tables = tables
        self._max_seq_len = max_seq_len
        self._pool: Any = None  # torch's handle of the graphs' shared memory
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        largest = min(_MAX_SIZE, 1 << (max_rows - 1).bit_length())
        size = largest
        while size:  # largest first, so that the smaller graphs reuse its memory in the pool
            for shares in (True, False) if size >= min_members else (False,):
                self._graphs[size, shares] = self._capture(size, shares)
            size //= 2

    def run(self, arrays: StepArrays) -> torch.Tensor | None:
        """Logits [S, vocab_size] of a decode step, valid until the next run; None on ranks
        without logits. Call only if `fits`."""
        count = len(arrays.rows)
        graph = self._graphs[_key(arrays)]
        _fill(graph.staging.numpy(), arrays.padded(_bucket(count)))
        graph.inputs.copy_(graph.staging, non_blocking=True)
        graph.graph.replay()
        return None if graph.logits is None else graph.logits[:count]

    def fits(self, arrays: StepArrays) -> bool:
        """Whether a graph covers the step."""
        return arrays.is_decode and _key(arrays) in self._graphs

    def _capture(self, size: int, shares: bool) -> _Graph:
        device = self._tables.hot.device
        empty = np.zeros(0, dtype=np.int64)
        zero = np.zeros(1, dtype=np.int64)
        prefixes = PrefixSets(empty, empty, zero) if shares else None
        nothing = StepArrays(*(empty,) * 4, zero, *(empty,) * 5, prefixes).padded(size)
        staging = torch.empty(sum(_part_sizes(size, shares)), dtype=torch.int64, pin_memory=True)
        _fill(staging.numpy(), nothing)
        inputs = staging.to(device)
        # Run twice on a side stream, to compile kernels and initialise libraries before capturing.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward(self._views(inputs, size, shares))
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(self._views(inputs, size, shares))
        self._pool = graph.pool()
        return _Graph(graph, staging, inputs, logits)

    def _views(self, inputs: torch.Tensor, size: int, shares: bool) -> StepTensors:
        """The packed inputs as a step; the casts are part of the graph."""
        parts = inputs.split(_part_sizes(size, shares))
        ids, positions, slots, logits_rows, starts, lens, rows = parts[:7]
        seal_hot, seal_sealed, seal_positions = parts[7:10]
        prefixes = SharedPrefixes(*(part.int() for part in parts[10:])) if shares else None
        return StepTensors(
            input_ids=ids,
            positions=positions,
            slots=slots,
            logits_rows=logits_rows,
            seal_hot=seal_hot.int(),
            seal_sealed=seal_sealed.int(),
            seal_positions=seal_positions,
            batch=self._tables.batch(
                starts.int(),
                lens.int(),
                rows.int(),
                max_query_len=1,
                max_seq_len=self._max_seq_len,
                prefixes=prefixes,
            ),
        )


def _bucket(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _key(arrays: StepArrays) -> tuple[int, bool]:
    return _bucket(len(arrays.rows)), arrays.prefixes is not None


def _part_sizes(size: int, shares: bool) -> list[int]:
    """Sizes of StepArrays' fields, in order, for a padded decode step."""
    prefixes = [size, size, num_starts(size)] if shares else []
    return [size, size, size, size, size + 1, size, size, size, size, size, *prefixes]


def _fill(staging: np.ndarray[tuple[int, ...], np.dtype[np.int64]], arrays: StepArrays) -> None:
    prefixes = arrays.prefixes
    np.concatenate(
        (
            arrays.input_ids,
            arrays.positions,
            arrays.slots,
            arrays.logits_rows,
            arrays.query_starts,
            arrays.seq_lens,
            arrays.rows,
            arrays.seal_hot,
            arrays.seal_sealed,
            arrays.seal_positions,
            *(() if prefixes is None else (prefixes.pages, prefixes.members, prefixes.starts)),
        ),
        out=staging,
    )
