"""Numba functions of `Affine`: how decode reads it, and how least squares are fitted."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba.np.numpy_support import carray

from kvmesh.kernels.addresses_numba import floats
from kvmesh.kernels.formats.affine.side import OFFSET_BYTES, Affine
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.planes_numba import unpacker
from kvmesh.kernels.formats.tiles_numba import (
    BY_CHANNEL,
    BY_TOKEN,
    SideLoad,
    compiled,
    read_bf16,
    scale_reader,
)
from kvmesh.kernels.numba_cache import keep_on_disk
from kvmesh.kernels.threads import in_parts

# Handing work to a thread costs about as much as fitting this many numbers.
MIN_NUMBERS_PER_THREAD = 1 << 15


def side_load(side: Affine, page_size: int, head_dim: int, dtype: str) -> SideLoad:
    runs = side.runs(page_size, head_dim)
    unpack = unpacker(side.width, page_size, head_dim, side.values)
    read_scales = scale_reader(side.scale)
    offsets_at = packed_bytes(side.width, page_size, head_dim)
    scales_at = offsets_at + runs * OFFSET_BYTES

    @compiled
    def load(part, tile, numbers):  # type: ignore[no-untyped-def]
        unpack(part, tile)
        read_scales(part, scales_at, runs, numbers[:runs])
        read_bf16(part, offsets_at, runs, numbers[runs:])
        return tile

    grid = BY_TOKEN if side.along == "token" else BY_CHANNEL
    return SideLoad(load, side.values, grid, 2 * runs)


def line(
    steps: torch.Tensor, mean: torch.Tensor, levels: float, first_share: float, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.py`. steps: [..., run] fp32 from 0 to levels; mean: [..., 1]"""
    steps, mean = steps.contiguous(), mean.contiguous()
    slopes, code_means = torch.empty_like(mean), torch.empty_like(mean)
    tensors = (steps, mean, slopes, code_means)
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    run, fit = steps.shape[-1], _ready_line()

    def work(first: int, end: int) -> None:
        fit(*addresses, run, levels, first_share, rounds, first, end)

    in_parts(mean.numel(), steps.numel() // MIN_NUMBERS_PER_THREAD, work)
    return slopes, code_means


@cache
def _ready_line() -> Any:
    """(addresses of steps, mean, slopes and means of codes, run, levels, first_share, rounds,
    first, end): of runs [first, end)"""

    @compiled
    def line(  # type: ignore[no-untyped-def]
        steps, means, slopes, code_means, run, levels, first_share, rounds, first, end
    ):
        top = np.float32(levels)
        for index in range(first, end):
            t = carray(floats(steps + 4 * index * run), run)
            mean = carray(floats(means + 4 * index), 1)[0]
            a = np.float32(first_share)
            b = np.float32(0.5) * top * (np.float32(1.0) - a)
            q_mean = np.float32(0.0)
            for _ in range(rounds):
                # Sums of codes, and of their squares, are whole numbers.
                step, shift = np.float32(1.0) / a, np.float32(0.5) - b / a
                total = squares = products = np.float32(0.0)
                for i in range(run):
                    q = np.floor(t[i] * step + shift)
                    q = min(max(q, np.float32(0.0)), top)
                    total += q
                    squares += q * q
                    products += q * (t[i] - mean)
                q_mean = total / np.float32(run)
                spread = squares - total * q_mean
                # If all codes are equal, the run is constant up to rounding and any grid will do.
                if spread > np.float32(1e-9):
                    a = max(products / spread, np.float32(1e-3))
                b = mean - a * q_mean
            carray(floats(slopes + 4 * index), 1)[0] = a
            carray(floats(code_means + 4 * index), 1)[0] = q_mean
        return 0

    keep_on_disk(line, "least squares")
    line.compile((*(numba.int64,) * 5, *(numba.float64,) * 2, *(numba.int64,) * 3))
    return line
