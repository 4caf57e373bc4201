"""How scales are stored: in bf16, or in a byte. Torch is imported only where it is needed.

    e5m3   value = (8 + m) 2^(e - 23), code = 8 e + m: 2^-20 (9.5e-7) to 3840, in steps of
           at most 1/8. Shifted left by 4 bits and added to 107 << 7 it is a bf16 number.

A byte is enough because codes are chosen against the stored scale: a scale that is off
by at most 1/16 acts like a slightly different clipping point. Scales outside the range are
clamped: a run of numbers below 1e-6 is replaced by its offset, and a run that needs a larger
scale is clipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCALE_FLOOR = 2.0**-125  # its half is still a normal fp32 number
BF16_MAX = 3.3895313892515355e38
SCALE_BYTES = {"bf16": 2, "e5m3": 1}
E5M3_BIAS = 107 << 7  # added to a code shifted by 4, gives the bits of a bf16 number
E5M3_MIN, E5M3_MAX = 2.0**-20, 3840.0


def store_scale(scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Positive fp32 [..., n] -> [..., n * SCALE_BYTES[kind]] uint8, rounded to nearest."""
    import torch

    if kind == "bf16":
        return scale.to(torch.bfloat16).contiguous().view(torch.uint8)
    # The 3 upper bits of the mantissa are kept: add half of the lowest one, then truncate.
    bits = scale.clamp(E5M3_MIN, E5M3_MAX).contiguous().view(torch.int32)
    code = ((bits + (1 << 19)) >> 20) - (E5M3_BIAS >> 4)
    return code.clamp_(0, 255).to(torch.uint8)


def load_scale(stored: torch.Tensor, kind: str) -> torch.Tensor:
    """The inverse: [..., n * SCALE_BYTES[kind]] uint8 -> [..., n] fp32.

    Accepts a slice of a page's bytes: every part of a page starts at an even byte.
    """
    import torch

    if kind == "bf16":
        return stored.view(torch.bfloat16).float()
    bits = (stored.to(torch.int32) << 20) + (E5M3_BIAS << 16)
    return bits.view(torch.float32)


def rounded_scale(scale: torch.Tensor, kind: str) -> torch.Tensor:
    """The scale after storing and loading."""
    return load_scale(store_scale(scale, kind), kind)
