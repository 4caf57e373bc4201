"""The tokens that steps have sampled, where the next step finds them: on the devices.

A step that is decided before its tokens are known names them by their rows, and every rank puts
them in when it computes the step.
"""

from __future__ import annotations

import torch

from kvmesh.workers.parallel.comm import Communicator


class LastTokens:
    """The last sampled token of every row, on one rank."""

    def __init__(self, max_rows: int, device: torch.device, comm: Communicator) -> None:
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._comm = comm

    def put(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """On the rank that samples. rows: [n] int64; tokens: [n] int32, negative for a fault,
        whose sequence gets some token that nobody sees"""
        self._tokens.index_copy_(0, rows, tokens.clamp(min=0).to(torch.int64))

    def share(self) -> None:
        """Give every rank the tokens of the one that samples. A call of the whole group."""
        self._comm.broadcast(self._tokens)

    def of(self, row: int) -> torch.Tensor:
        """[1] int64"""
        return self._tokens[row : row + 1]

    def put_in(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64, where ~row stands for the row's last token."""
        sampled = self._tokens.index_select(0, (~input_ids).clamp_(min=0))
        return torch.where(input_ids < 0, sampled, input_ids)
