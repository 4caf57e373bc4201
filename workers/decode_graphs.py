"""Decode steps replayed from CUDA graphs, for some batch sizes and amounts of attention.

A size has graphs for steps whose sequences share prefixes, if that is possible, and for other
steps, each for few and for many parts of attention: a part that does not exist costs a program
that ends at once. A graph's inputs are fixed tensors: a step is padded to the next size, copied
into them with one transfer, and replayed. Lengths and block tables are read on the device, so a
graph stays valid as sequences grow, end and change rows. Steps beyond the largest graph are
limited by the device, not by launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvmesh.kernels.attention import DecodeWork, Round
from kvmesh.workers.shared_prefixes import PrefixSets, num_starts
from kvmesh.workers.step import BlockTables, StepArrays, StepBuffer, StepTensors, Works, in_order

Forward = Callable[[StepTensors], torch.Tensor | None]

# In steps of 8 up to 64, then with at most an eighth of padding.
SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32))
# Parts of attention, beyond one for each sequence.
PARTS = (512, 4096)


@dataclass(frozen=True, slots=True)
class _Key:
    """size: sequences; shares: whether there are shared prefixes; parts: one of PARTS"""

    size: int
    shares: bool
    parts: int


@dataclass(frozen=True, slots=True)
class _Graph:
    """inputs: a step's buffer on the device; sampled_rows: within it"""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    sampled_rows: torch.Tensor
    logits: torch.Tensor | None


class DecodeGraphs:
    """Captures every graph at construction; all ranks of a group capture in the same order.

    sliding_windows: of the model's layers
    min_members: minimum number of sequences in a set of shared prefixes
    """

    def __init__(
        self,
        forward: Forward,
        tables: BlockTables,
        *,
        max_rows: int,
        sliding_windows: frozenset[int | None],
        min_members: int,
    ) -> None:
        self._forward = forward
        self._tables = tables
        self._windows = sliding_windows
        self._pool: Any = None  # torch's handle of the graphs' shared memory
        self._graphs: dict[_Key, _Graph] = {}
        self._sizes = sizes_for(max_rows)
        for size in reversed(self._sizes):  # so that smaller graphs reuse the memory of larger ones
            for parts in reversed(PARTS):
                for shares in (True, False) if size >= min_members else (False,):
                    key = _Key(size, shares, parts)
                    self._graphs[key] = self._capture(key)

    def run(self, arrays: StepArrays, works: Works) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Logits [S, vocab_size] of a decode step, None on ranks without logits, and its sampled
        rows; both valid until the next run. Call only if `fits`."""
        key = self._key(arrays, works)
        assert key is not None
        graph, count = self._graphs[key], len(arrays.rows)
        buffer = StepBuffer.of(arrays.padded(key.size), padded(works, key.size), pinned=True)
        graph.inputs.copy_(buffer.host, non_blocking=True)
        graph.graph.replay()
        logits = None if graph.logits is None else graph.logits[:count]
        return logits, graph.sampled_rows[:count]

    def fits(self, arrays: StepArrays, works: Works) -> bool:
        """Whether a graph covers the step."""
        return arrays.is_decode and self._key(arrays, works) in self._graphs

    def _key(self, arrays: StepArrays, works: Works) -> _Key | None:
        return key_of(arrays, works, self._sizes)

    def _capture(self, key: _Key) -> _Graph:
        device, size = self._tables.hot.device, key.size
        empty = np.zeros(0, dtype=np.int64)
        zero = np.zeros(1, dtype=np.int64)
        prefixes = PrefixSets(empty, empty, zero) if key.shares else None
        firsts = None if self._tables.stride == 1 else empty
        nothing = StepArrays(*(empty,) * 4, zero, *(empty,) * 5, prefixes, firsts).padded(size)
        # A graph reads all tokens where sampling leaves them (last_tokens.py).
        nothing = replace(nothing, input_ids=np.full(size, -1))
        rounds = (Round(0, size, 0, size + key.parts),)
        no_work = DecodeWork(zero, zero)
        bounds = padded(dict.fromkeys(in_order(self._windows), (no_work, rounds)), size)
        buffer = StepBuffer.of(nothing, bounds, pinned=True)
        inputs = buffer.host.to(device)
        step = buffer.tensors(inputs, nothing, bounds, self._tables)

        def forward() -> torch.Tensor | None:
            return self._forward(step)

        # Run twice on a side stream, to compile kernels and initialise libraries before capturing.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                forward()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward()
        self._pool = graph.pool()
        return _Graph(graph, inputs, step.sampled_rows, logits)


def sizes_for(max_rows: int) -> tuple[int, ...]:
    """Sizes of which the largest covers max_rows sequences, if any does."""
    count = next((i + 1 for i, size in enumerate(SIZES) if size >= max_rows), len(SIZES))
    return SIZES[:count]


def key_of(arrays: StepArrays, works: Works, sizes: tuple[int, ...]) -> _Key | None:
    """The smallest graph that covers a decode step, or None."""
    count = len(arrays.rows)
    size = next((size for size in sizes if size >= count), None)
    slots = max((work.num_slots for work, _ in works.values()), default=0)
    parts = next((parts for parts in PARTS if slots <= count + parts), None)
    if size is None or parts is None:
        return None
    return _Key(size, arrays.prefixes is not None, parts)


def padded(works: Works, size: int) -> Works:
    """Padded to `size` sequences without work, with as many sets as they could form."""

    def longer(starts: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
        return np.append(starts, np.full(length - len(starts), starts[-1], dtype=starts.dtype))

    return {
        window: (
            DecodeWork(longer(work.starts, size + 1), longer(work.set_starts, num_starts(size))),
            rounds,
        )
        for window, (work, rounds) in works.items()
    }
