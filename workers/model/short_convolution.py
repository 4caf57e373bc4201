"""Causal convolutions over a few tokens of each channel, which continue where a chunk ended."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(conv: nn.Conv1d, x: Tensor, tail: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Chunks of `length` tokens, each after the inputs that came before it.

    conv: of this rank's channels; its padding is not used
    x: [n * length, channels]; tail: [n, channels, kernel - 1], the inputs before
    Returns like x, and the tail of the next chunk, like tail.
    """
    x = x.view(-1, length, x.shape[-1]).transpose(1, 2)
    x = torch.cat((tail, x), dim=-1)
    out = F.conv1d(x, conv.weight, conv.bias, groups=x.shape[1])
    return out.transpose(1, 2).flatten(0, 1), x[..., length:]
