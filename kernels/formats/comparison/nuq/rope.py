"""Applying and undoing RoPE: rotating pairs of channels by an angle."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def phases(inv_freq: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """e^(i angle) of positions [...], the angles positions * inv_freq -> [..., planes] complex64.

    The angles are computed in fp64: at a million tokens fp32 is off by a few hundredths.
    """
    angles = positions.double().unsqueeze(-1) * inv_freq.double()
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


@dataclass(frozen=True, slots=True)
class RopePairs:
    """Which channels form a pair: 2i and 2i + 1 if interleaved, otherwise i and i + planes.

    Channels from 2 * planes on are not rotated.
    """

    interleaved: bool

    def rotate(self, x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        """x [..., head_dim] fp32, phase [..., planes], broadcast -> like x, rotated"""
        planes = phase.shape[-1]
        if self.interleaved:
            first, second = slice(0, 2 * planes, 2), slice(1, 2 * planes, 2)
        else:
            first, second = slice(0, planes), slice(planes, 2 * planes)
        cos, sin = phase.real, phase.imag
        out = x.clone(memory_format=torch.contiguous_format)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out
