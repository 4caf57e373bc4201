"""The layout of `packing.py` in Triton: unpacking codes from a page, and packing them."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmesh.kernels.formats.packing import PLANES
from kvmesh.kernels.formats.tiles_triton import load, padded


@triton.constexpr_function
def packed_bytes(width: int, page_size: int, head_dim: int) -> int:
    return page_size * head_dim * width // 8


@triton.jit
def load_codes(part_ptr, first_slot, SIDE: tl.constexpr, FORM: tl.constexpr):
    """Codes minus half their range, int32, of a tile of sealed keys that begins at first_slot and
    lies in one block: for keys [block_n, block_d], for values transposed.

    Channels from head_dim on hold arbitrary finite numbers.
    """
    PAGE_SIZE: tl.constexpr = FORM.page_size
    HEAD_DIM: tl.constexpr = FORM.head_dim
    BLOCK_N: tl.constexpr = FORM.block_n
    channels = tl.arange(0, FORM.block_d)
    mask_d = None if FORM.block_d == HEAD_DIM else channels < HEAD_DIM
    WIDTH: tl.constexpr = SIDE.width
    BITS: tl.constexpr = 2 if WIDTH == 3 else WIDTH
    P: tl.constexpr = 8 // BITS
    BLOCK: tl.constexpr = min(64, PAGE_SIZE)
    block = first_slot // BLOCK
    # Relative to the block, so that the compiler sees that each thread loads adjacent bytes.
    n = tl.arange(0, BLOCK_N)
    if BLOCK_N != BLOCK:
        n += first_slot % BLOCK
    if SIDE.values:
        ROWS: tl.constexpr = HEAD_DIM // P
        COLUMNS: tl.constexpr = BLOCK
        d = channels[:, None]
        plane, row, column = d // ROWS, d % ROWS, n[None, :]
    else:
        ROWS: tl.constexpr = BLOCK // P
        COLUMNS: tl.constexpr = HEAD_DIM
        plane, row, column = n[:, None] % P, n[:, None] // P, channels[None, :]
    mask = None
    if mask_d is not None:
        mask = mask_d[:, None] if SIDE.values else mask_d[None, :]
    byte_ptr = part_ptr + block * (ROWS * COLUMNS)
    byte = load(byte_ptr + row * COLUMNS + column, mask).to(tl.int32)
    if WIDTH == 8:
        codes = byte
    else:
        HALF_RANGE: tl.constexpr = 1 << (WIDTH - 1)
        codes = (byte >> (plane * BITS)) & ((1 << BITS) - 1)
        if WIDTH == 3:
            HALF: tl.constexpr = COLUMNS // 2
            high_ptr = part_ptr + PAGE_SIZE * HEAD_DIM // 4 + block * (ROWS * HALF)
            high = load(high_ptr + row * HALF + column % HALF, mask).to(tl.int32)
            codes |= ((high >> _high_bit(plane, column // HALF)) & 1) << 2
        # The top plane's highest bit is stored flipped.
        codes = (codes ^ tl.where(plane == P - 1, HALF_RANGE, 0)) - HALF_RANGE
    return codes


@triton.jit
def _high_bit(plane, half):
    """The bit of width 3 that holds a plane's high bit: 2, 4, 6, 7 or 1, 3, 5, 0, by half."""
    return tl.where(
        half == 0, tl.where(plane == 3, 7, 2 * plane + 2), tl.where(plane == 3, 0, 2 * plane + 1)
    )


# Sealing. A block of a page is held as [N, D], each padded to a power of two *in parts*,
# so that a reshape gives the planes: tokens in two halves, and channels in two halves (keys)
# or in planes (values).


@triton.constexpr_function
def block_tokens(page_size: int) -> int:
    return min(64, page_size)


@triton.constexpr_function
def channel_parts(side) -> int:
    return PLANES[side.width] if side.values else 2


@triton.jit
def block_slots(PAGE_SIZE: tl.constexpr):
    """Slots in the padded order, [N] int32, and whether they exist."""
    HALF: tl.constexpr = block_tokens(PAGE_SIZE) // 2
    PAD: tl.constexpr = padded(HALF)
    offs = tl.arange(0, 2 * PAD)
    return (offs // PAD) * HALF + offs % PAD, offs % PAD < HALF


@triton.jit
def block_channels(SIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Channels in the padded order, [D] int32, and whether they exist."""
    PARTS: tl.constexpr = channel_parts(SIDE)
    SPAN: tl.constexpr = HEAD_DIM // PARTS
    PAD: tl.constexpr = padded(SPAN)
    offs = tl.arange(0, PARTS * PAD)
    return (offs // PAD) * SPAN + offs % PAD, offs % PAD < SPAN


@triton.jit
def store_codes(codes, part_ptr, block, SIDE: tl.constexpr, FORM: tl.constexpr):
    """codes [N, D] int32 of a block, in the orders of `block_slots` and `block_channels`."""
    PAGE_SIZE: tl.constexpr = FORM.page_size
    HEAD_DIM: tl.constexpr = FORM.head_dim
    WIDTH: tl.constexpr = SIDE.width
    BITS: tl.constexpr = 2 if WIDTH == 3 else WIDTH
    P: tl.constexpr = 8 // BITS
    BLOCK: tl.constexpr = block_tokens(PAGE_SIZE)
    HALF_N: tl.constexpr = BLOCK // 2
    PAD_N: tl.constexpr = padded(HALF_N)
    N: tl.constexpr = codes.shape[0]
    D: tl.constexpr = codes.shape[1]
    planes = tl.arange(0, P)
    low_bits = planes * BITS
    flip = tl.where(planes == P - 1, 1 << (WIDTH - 1), 0)
    codes_ptr = part_ptr + block * (BLOCK * HEAD_DIM // P)
    if SIDE.values:
        SPAN: tl.constexpr = HEAD_DIM // P
        PAD: tl.constexpr = D // P
        x = codes.reshape(N, P, PAD) ^ flip[None, :, None]
        low = tl.sum((x & ((1 << BITS) - 1)) << low_bits[None, :, None], 1)  # [N, PAD]
        slots, mask_n = block_slots(PAGE_SIZE)
        rows = tl.arange(0, PAD)
        mask = mask_n[:, None] & (rows < SPAN)[None, :]
        tl.store(codes_ptr + rows[None, :] * BLOCK + slots[:, None], low.to(tl.int8), mask=mask)
    else:
        ROWS: tl.constexpr = N // P
        x = codes.reshape(ROWS, P, D) ^ flip[None, :, None]
        low = tl.sum((x & ((1 << BITS) - 1)) << low_bits[None, :, None], 1)  # [ROWS, D]
        channels, mask_d = block_channels(SIDE, HEAD_DIM)
        at = tl.arange(0, ROWS)
        rows = (at // (PAD_N // P)) * (HALF_N // P) + at % (PAD_N // P)
        mask_r = at % (PAD_N // P) < HALF_N // P
        mask = mask_r[:, None] & mask_d[None, :]
        tl.store(
            codes_ptr + rows[:, None] * HEAD_DIM + channels[None, :], low.to(tl.int8), mask=mask
        )
    if WIDTH == 3:
        high_ptr = part_ptr + PAGE_SIZE * HEAD_DIM // 4 + block * (BLOCK * HEAD_DIM // 8)
        halves = tl.arange(0, 2)
        if SIDE.values:
            bit = _high_bit(planes[None, :], halves[:, None])  # [2, P]
            y = (x >> 2).reshape(2, PAD_N, P, PAD) << bit[:, None, :, None]
            high = tl.sum(tl.sum(y, 2), 0)  # [PAD_N, PAD]
            offs_n = tl.arange(0, PAD_N)
            mask = (offs_n < HALF_N)[:, None] & (rows < SPAN)[None, :]
            to = rows[None, :] * HALF_N + offs_n[:, None]
        else:
            bit = _high_bit(planes[:, None], halves[None, :])  # [P, 2]
            y = (x >> 2).reshape(ROWS, P, 2, D // 2) << bit[None, :, :, None]
            high = tl.sum(tl.sum(y, 1), 1)  # [ROWS, D / 2]
            offs_d = tl.arange(0, D // 2)
            mask = mask_r[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
            to = rows[:, None] * (HEAD_DIM // 2) + offs_d[None, :]
        tl.store(high_ptr + to, high.to(tl.int8), mask=mask)
