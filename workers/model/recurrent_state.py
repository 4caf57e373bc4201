"""The recurrent states of sequences, in rows: a sequence's row is that of its block tables.

A row is used from the step that computes a sequence's first token, where its state is 0 whatever
is in the row, until the scheduler gives the row to another sequence. One more row takes what the
padding of captured graphs writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvmesh.workers.model.state_shape import StateShape

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StatePart:
    """Chunks of one length: all of one token together, longer ones one by one.

    tokens: of the step, in order of the chunks; seqs: the chunks
    """

    tokens: Tensor | slice
    seqs: Tensor | slice
    length: int


class StepStates:
    """The states of a step's S sequences.

    rows: [S] int64; begins: [S] bool, whether a sequence begins with this step
    """

    def __init__(
        self, tails: Tensor, memories: Tensor, rows: Tensor, begins: Tensor, starts: Ints
    ) -> None:
        """tails, memories: of RecurrentStates; starts: [S + 1], where each chunk's tokens begin"""
        self._tails, self._memories = tails, memories
        self._rows, self._begins = rows, begins
        self.parts = _parts(starts, rows.device)

    @classmethod
    def of_one(
        cls, shape: StateShape, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> StepStates:
        """For one sequence from its first token on, whose state is not kept."""
        states = RecurrentStates(shape, 1, dtype, device)
        row = torch.zeros(1, dtype=torch.int64, device=device)
        starts = np.array([0, num_tokens])
        return cls(states.tails, states.memories, row, row == 0, starts)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The sequences' tails, [S, channels, tail], and memories, [S, …], before the step."""
        return tuple(  # type: ignore[return-value]
            store[layer]
            .index_select(0, self._rows)
            .masked_fill_(self._begins.view(-1, *(1,) * (store.dim() - 2)), 0.0)
            for store in (self._tails, self._memories)
        )

    def write(self, layer: int, tails: Tensor, memories: Tensor) -> None:
        """Those after the step."""
        self._tails[layer].index_copy_(0, self._rows, tails)
        self._memories[layer].index_copy_(0, self._rows, memories)


class RecurrentStates:
    """One rank's states of up to `rows` sequences.

    tails: [layers, rows + 1, channels, tail]; memories: [layers, rows + 1, …] fp32
    """

    def __init__(
        self, shape: StateShape, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        each = shape.layers, rows + 1
        self.tails = torch.zeros(*each, shape.channels, shape.tail, dtype=dtype, device=device)
        self.memories = torch.zeros(*each, *shape.memory, dtype=torch.float32, device=device)

    def step(
        self, rows: Tensor, positions: Tensor, query_starts: Tensor, starts: Ints
    ) -> StepStates:
        """rows: [S] int32, positions: [T] int64, query_starts: [S + 1] int32, of `StepTensors`;
        starts: the latter on the host"""
        rows = rows.long()
        if len(positions) == len(rows):  # it may be padded
            begins = positions == 0
            rows = torch.where(query_starts.diff() == 0, self.tails.shape[1] - 1, rows)
            starts = np.arange(len(rows) + 1)
        else:
            first = torch.tensor(starts[:-1], device=positions.device)
            begins = positions.index_select(0, first) == 0
        return StepStates(self.tails, self.memories, rows, begins, starts)


def _parts(starts: Ints, device: torch.device) -> list[StatePart]:
    lengths = np.diff(starts)
    single = np.flatnonzero(lengths == 1)
    if len(single) == len(lengths):
        return [StatePart(slice(None), slice(None), 1)]
    parts = []
    if len(single):
        firsts, seqs = torch.from_numpy(starts[single]), torch.from_numpy(single)
        parts.append(StatePart(firsts.to(device), seqs.to(device), 1))
    for seq in np.flatnonzero(lengths > 1):
        span = slice(int(starts[seq]), int(starts[seq + 1]))
        parts.append(StatePart(span, slice(int(seq), int(seq) + 1), int(lengths[seq])))
    return parts
