"""How scales are stored: in bf16, or in a byte. Torch is imported where a tensor comes in.

    e5m3   value = (8 + m) 2^(e - 23), code = 8 e + m: 2^-20 (9.5e-7) to 3840, in steps of
           at most 1/8. Shifted left by 4 bits and added to 107 << 7 it is a bf16 number.

A byte is enough where the codes are chosen against the stored scale: a scale off
by 1/16 at most is what another clipping point would be. Scales outside are set to
the nearest end: a run of numbers below 1e-6 becomes its offset, one that would
need a greater scale is clipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCALE_BYTES = {"bf16": 2, "e5m3": 1}
E5M3_BIAS = 107 << 7  # what makes a code, shifted by 4, the bits of a bf16 number
E5M3_MIN, E5M3_MAX = 2.0**-20, 3840.0


def store_scale(scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Positive fp32 [..., n] -> [..., n * SCALE_BYTES[kind]] uint8, rounded to the nearest."""
    import torch

    if kind == "bf16":
        return scale.to(torch.bfloat16).contiguous().view(torch.uint8)
    # The 3 upper bits of the mantissa are kept: add half of the lowest, then cut.
    bits = scale.clamp(E5M3_MIN, E5M3_MAX).contiguous().view(torch.int32)
    code = ((bits + (1 << 19)) >> 20) - (E5M3_BIAS >> 4)
    return code.clamp_(0, 255).to(torch.uint8)


def load_scale(stored: torch.Tensor, kind: str) -> torch.Tensor:
    """The inverse: [..., n * SCALE_BYTES[kind]] uint8 -> [..., n] fp32.

    A part of a page's bytes will do: everything in a page starts at an even byte.
    """
    import torch

    if kind == "bf16":
        return stored.view(torch.bfloat16).float()
    bits = (stored.to(torch.int32) << 20) + (E5M3_BIAS << 16)
    return bits.view(torch.float32)


def rounded_scale(scale: torch.Tensor, kind: str) -> torch.Tensor:
    """The scale as it will be read."""
    return load_scale(store_scale(scale, kind), kind)
