"""The tokens that steps have sampled, where the next step finds them: on the devices.

A step that is decided before its tokens are known names them by their rows, and every rank puts
them in when it computes the step.
"""

from __future__ import annotations

import torch

from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.step import StepArrays, StepTensors, ints


class LastTokens:
    """The last sampled token of every row, on one rank."""

    def __init__(self, max_rows: int, device: torch.device, comm: Communicator) -> None:
        self._tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._comm = comm

    def put(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """On the rank that samples. rows: [n] int64; tokens: [n] int32, negative for a fault,
        whose sequence gets some token that nobody sees"""
        self._tokens.index_copy_(0, rows, tokens.clamp(min=0))

    def put_known(self, arrays: StepArrays) -> None:
        """Of a decode step, the tokens that its plan has, for a graph that reads them here."""
        known = arrays.input_ids >= 0
        if known.any():
            device = self._tokens.device
            rows = ints(arrays.rows[known], device)
            self._tokens.index_copy_(0, rows, ints(arrays.input_ids[known], device, torch.int32))

    def share(self) -> None:
        """Give every rank the tokens of the one that samples. A call of the whole group."""
        self._comm.broadcast(self._tokens)

    def of(self, row: int) -> torch.Tensor:
        """[1] int32"""
        return self._tokens[row : row + 1]

    def put_in(self, step: StepTensors) -> torch.Tensor:
        """[T] token ids of a step, some of which only the ranks know."""
        ids = step.input_ids
        if step.num_pending == len(ids):
            return self._tokens.index_select(0, step.batch.rows)
        sampled = self._tokens.index_select(0, (~ids).clamp_(min=0))
        return torch.where(ids < 0, sampled, ids)
