"""How codes of 1 to 8 bits are packed into bytes: in planes, for integer tensor cores.

A page is cut into blocks of 64 tokens (fewer if the page is smaller). A block of
keys is a table [tokens, head_dim], a block of values a table [head_dim, tokens]: the
axis that attention sums over comes last. P codes share a byte. They come from P
different *rows*, so that a plane (the codes at one position of the bytes) is again a table:

    keys     plane p is rows P r + p:      neighbouring tokens share a byte
    values   plane p is rows p R + r:      R = rows / P; distant channels share a byte

    width   P   byte (r, x)
    8       1   code - 128, signed
    4       2   p0 | (p1 ^ 8) << 4
    2       4   p0 | p1 << 2 | p2 << 4 | (p3 ^ 2) << 6
    3       4   the low 2 bits of each: p0 | p1 << 2 | p2 << 4 | p3 << 6; then, after all
                of them, a byte (r, x) for columns x and x + columns / 2 of the high
                bits, (p3 ^ 4) for p3: column x in bits 2, 4, 6, 7, the other in 1, 3, 5, 0
    1       8   p0 | p1 << 1 | ... | p7 << 7, rows as for values: signs of residuals

A kernel extracts a plane with one AND and no shift: codes at bits 2p are the codes times
4^p, and the top plane, read as signed, is its codes minus half their range,
which is why its highest bit is stored flipped.

Torch is imported only in functions that take a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 64
PLANES = {8: 1, 4: 2, 3: 4, 2: 4, 1: 8}
# Width 3: where plane p's high bit is stored, for the first and the second half of the columns.
HIGH_BITS = ((2, 4, 6, 7), (1, 3, 5, 0))


def packed_bytes(width: int, page_size: int, head_dim: int) -> int:
    """Bytes of a page's codes. Raises ValueError if head_dim does not fill whole bytes."""
    need = {8: 1, 4: 2, 3: 8, 2: 4, 1: 8}[width]
    if head_dim % need:
        raise ValueError(f"head_dim: {width}-bit codes need a multiple of {need}, got {head_dim}")
    return page_size * head_dim * width // 8


def pack(codes: torch.Tensor, width: int, *, values: bool) -> torch.Tensor:
    """codes [..., page_size, head_dim] uint8 below 2^width -> [..., bytes] uint8."""
    import torch

    block = min(BLOCK_TOKENS, codes.shape[-2])
    table = codes.unflatten(-2, (-1, block))
    if values:
        table = table.mT
    if width == 8:
        return (table ^ 128).flatten(-3)  # type: ignore[no-any-return]
    planes = list(_split(table, PLANES[width], values))
    if width > 1:
        planes[-1] = planes[-1] ^ (1 << (width - 1))
    bits = 2 if width == 3 else width
    packed = _overlay([plane & (2**bits - 1) for plane in planes], range(0, 8, bits))
    if width != 3:
        return packed.flatten(-3)
    halves = [(plane >> 2).chunk(2, dim=-1) for plane in planes]
    first, second = zip(*halves, strict=True)
    high = _overlay([*first, *second], [*HIGH_BITS[0], *HIGH_BITS[1]])
    return torch.cat((packed.flatten(-3), high.flatten(-3)), dim=-1)


def unpack(
    data: torch.Tensor, width: int, page_size: int, head_dim: int, *, values: bool
) -> torch.Tensor:
    """The inverse: [..., page_size, head_dim] uint8, contiguous.

    data: [..., bytes] uint8; bytes after the codes are ignored
    """
    import torch

    block = min(BLOCK_TOKENS, page_size)
    rows, columns = (head_dim, block) if values else (block, head_dim)
    count = PLANES[width]
    bits = 2 if width == 3 else width
    middle = page_size * head_dim * bits // 8
    table = data[..., :middle].unflatten(-1, (-1, rows // count, columns))
    if width == 8:
        codes = table ^ 128
    else:
        planes = [(table >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        if width == 3:
            end = packed_bytes(3, page_size, head_dim)
            high = data[..., middle:end].unflatten(-1, (-1, rows // count, columns // 2))
            for p, plane in enumerate(planes):
                ones = [(high >> at[p]) & 1 for at in HIGH_BITS]
                planes[p] = plane | (torch.cat(ones, dim=-1) << 2)
        if width > 1:
            planes[-1] = planes[-1] ^ (1 << (width - 1))
        codes = torch.cat(planes, dim=-2) if values else torch.stack(planes, dim=-2).flatten(-3, -2)
    by_token = codes.mT.contiguous() if values else codes
    return by_token.flatten(-3, -2)  # type: ignore[no-any-return]


def _split(table: torch.Tensor, count: int, values: bool) -> tuple[torch.Tensor, ...]:
    """The planes of a table [..., rows, columns]."""
    if values:
        return table.chunk(count, dim=-2)
    return table.unflatten(-2, (-1, count)).unbind(-2)  # type: ignore[no-any-return]


def _overlay(parts: list[torch.Tensor], shifts: list[int] | range) -> torch.Tensor:
    byte = parts[0] << shifts[0]
    for part, shift in zip(parts[1:], shifts[1:], strict=True):
        byte = byte | (part << shift)
    return byte
