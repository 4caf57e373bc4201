"""How codes of 1 to 8 bits share bytes: in planes, in contiguous slices of a token's channels.

With b bits a code, 8 / b codes share a byte: the byte i of a token holds its
channels i, i + head_dim b/8, i + 2 head_dim b/8, ..., the first in the low bits. So
unpacking gives contiguous slices of channels and permutes nothing. Codes of 3
bits are two planes: the low 2 bits of a page's codes, then their high bit.
Torch is imported where a tensor comes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def packed_bytes(width: int, page_size: int, head_dim: int) -> int:
    """Bytes of a page's codes. Raises ValueError where head_dim does not fill bytes."""
    for plane in _PLANES[width]:
        if head_dim * plane % 8:
            raise ValueError(
                f"head_dim: {width}-bit codes need a multiple of {8 // plane}, got {head_dim}"
            )
    return page_size * head_dim * width // 8


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """codes [..., page_size, head_dim] uint8 below 2^width -> [..., bytes] uint8."""
    import torch

    planes = []
    shift = 0
    for plane in _PLANES[width]:
        part = (codes >> shift) & (2**plane - 1) if len(_PLANES[width]) > 1 else codes
        slices = part.chunk(8 // plane, dim=-1)
        byte = slices[0]
        for index, piece in enumerate(slices[1:], start=1):
            byte = byte | (piece << (index * plane))
        planes.append(byte.flatten(-2))
        shift += plane
    return torch.cat(planes, dim=-1) if len(planes) > 1 else planes[0].contiguous()


def unpack(data: torch.Tensor, width: int, page_size: int, head_dim: int) -> torch.Tensor:
    """The inverse: [..., bytes] uint8 -> [..., page_size, head_dim] uint8."""
    import torch

    codes = None
    shift = start = 0
    for plane in _PLANES[width]:
        end = start + packed_bytes(plane, page_size, head_dim)
        byte = data[..., start:end].unflatten(-1, (page_size, -1))
        if plane < 8:
            mask = 2**plane - 1
            shifts = range(0, 8, plane)
            byte = torch.cat([(byte >> by) & mask for by in shifts], dim=-1)
        codes = byte if codes is None else codes | (byte << shift)
        start = end
        shift += plane
    assert codes is not None
    return codes
