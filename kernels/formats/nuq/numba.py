"""Numba functions of `NonUniform`."""

from __future__ import annotations

import numpy as np

from kvmesh.kernels.formats.levels_numba import look_up
from kvmesh.kernels.formats.nuq.reference import OFFSET_STEPS
from kvmesh.kernels.formats.nuq.side import CHANNEL_BYTES, SCALE_BYTES, VALUE_BYTES, NonUniform
from kvmesh.kernels.formats.nuq.table import BASE, DIGITS
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.planes_numba import unpacker
from kvmesh.kernels.formats.tiles_numba import SideLoad, compiled, float_of, scale_reader


def side_load(side: NonUniform, page_size: int, head_dim: int, dtype: str) -> SideLoad:
    return _values(side, page_size, head_dim) if side.values else _keys(side, page_size, head_dim)


def _keys(side: NonUniform, page_size: int, head_dim: int) -> SideLoad:
    unpack = unpacker(side.width, page_size, head_dim, values=False)
    levels_of = look_up(side.width)
    count = side.outliers(head_dim)
    kept_at = packed_bytes(side.width, page_size, head_dim)
    channels_at = kept_at + VALUE_BYTES * count * page_size
    position_at = channels_at + CHANNEL_BYTES * count * page_size
    # The table has head_dim / 2 planes; the pairs that RoPE does not rotate are at the end.
    planes = head_dim // 2
    rotated, interleaved = side.rope or (planes, False)
    apart = 1 if interleaved else rotated
    step = 2 if interleaved else 1
    tokens_at = 2 * 2**side.width  # after levels and bounds
    digits_at = tokens_at + 2 * page_size * planes
    sines = DIGITS * BASE * planes  # the sines follow as many cosines
    heads_at = digits_at + 2 * sines

    @compiled
    def load(part, tile, numbers, table, head):  # type: ignore[no-untyped-def]
        unpack(part, tile)
        levels_of(table, tile)
        page_cos, page_sin = numbers[:rotated], numbers[rotated:]
        for p in range(rotated):
            page_cos[p], page_sin[p] = np.float32(1.0), np.float32(0.0)
        for digit in range(DIGITS):
            at = digits_at + (digit * BASE + np.int64(part[position_at + digit])) * planes
            for p in range(rotated):
                c, s = table[at + p], table[at + sines + p]
                page_cos[p], page_sin[p] = (
                    page_cos[p] * c - page_sin[p] * s,
                    page_sin[p] * c + page_cos[p] * s,
                )
        at = heads_at + head * 3 * head_dim
        scale, zero = table[at : at + head_dim], table[at + head_dim : at + 2 * head_dim]
        # In separate passes: reading a row right after writing one number of it would stall.
        for n in range(page_size):
            row = tile[n]
            for d in range(head_dim):
                row[d] = row[d] * scale[d] + zero[d]
        kept = part[kept_at:channels_at].view(np.uint16)
        for i in range(page_size * count):
            channel = part[channels_at + i]
            if channel < head_dim:  # guards against a corrupted page
                tile[i // count, channel] = float_of(np.int32(kept[i]) << np.int32(16))
        for n in range(page_size):
            row, at = tile[n], tokens_at + n * planes
            token_cos = table[at : at + rotated]
            token_sin = table[at + page_size * planes : at + page_size * planes + rotated]
            for p in range(rotated):
                cos = token_cos[p] * page_cos[p] - token_sin[p] * page_sin[p]
                sin = token_sin[p] * page_cos[p] + token_cos[p] * page_sin[p]
                a, b = row[step * p], row[step * p + apart]
                row[step * p] = a * cos - b * sin
                row[step * p + apart] = b * cos + a * sin
        return tile

    return SideLoad(load, numbers_size=2 * rotated)


def _values(side: NonUniform, page_size: int, head_dim: int) -> SideLoad:
    unpack = unpacker(side.width, page_size, head_dim, values=True)
    levels_of = look_up(side.width)
    read_scales = scale_reader("e5m3")
    count = side.outliers(head_dim)
    kept_at = packed_bytes(side.width, page_size, head_dim)
    channels_at = kept_at + VALUE_BYTES * count * page_size
    scales_at = channels_at + CHANNEL_BYTES * count * page_size
    offsets_at = scales_at + SCALE_BYTES * page_size
    step = np.float32(1.0 / OFFSET_STEPS)

    @compiled
    def load(part, tile, numbers, table, head):  # type: ignore[no-untyped-def]
        unpack(part, tile)
        levels_of(table, tile)
        scale, offset = numbers[:page_size], numbers[page_size:]
        read_scales(part, scales_at, page_size, scale)
        steps = part[offsets_at:].view(np.int8)
        for n in range(page_size):
            offset[n] = np.float32(steps[n]) * (scale[n] * step)
        for d in range(head_dim):
            row = tile[d]
            for n in range(page_size):
                row[n] = row[n] * scale[n] + offset[n]
        kept = part[kept_at:channels_at].view(np.uint16)
        for i in range(page_size * count):
            channel = part[channels_at + i]
            if channel < head_dim:  # guards against a corrupted page
                tile[channel, i // count] = float_of(np.int32(kept[i]) << np.int32(16))
        return tile

    return SideLoad(load, transposed=True, numbers_size=2 * page_size)
