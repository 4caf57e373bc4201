"""`merge_states` as one kernel; the same signature as the public operator."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Parts that are read at a time, and channels of a program: a thousand parts are merged in eight
# rounds, by as many programs as there are blocks of channels.
BLOCK_P, BLOCK_D = tl.constexpr(128), tl.constexpr(32)
MERGE_OPTIONS = {"num_warps": 4}


def channel_blocks(head_dim: int) -> int:
    """Programs for the channels of a head: axis 2 of the grid of kernels that merge."""
    return -(-head_dim // BLOCK_D.value)


@triton.jit
def merge_row(parts, first_row, stride_part, num_parts, merged, to_row, HEAD_DIM: tl.constexpr):
    """Rows first_row + i * stride_part, i < num_parts, of parts (outs [rows, HEAD_DIM], lses
    [rows]) -> row `to_row` of merged (out, lse); this program's block of channels (axis 2 of the
    grid).

    The order of the sums depends on num_parts alone.
    """
    outs_ptr, lses_ptr = parts
    out_ptr, lse_ptr = merged
    offs_p = tl.arange(0, BLOCK_P)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        part = first + offs_p
        at = first_row + part.to(tl.int64) * stride_part
        lses = tl.load(lses_ptr + at, mask=part < num_parts, other=float("-inf"))
        seen = lses != float("-inf")
        # Outputs of parts without a visible key may hold anything: they are not read.
        x = tl.load(
            outs_ptr + at[:, None] * HEAD_DIM + offs_d[None, :],
            mask=seen[:, None] & mask_d[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(lses, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        keep = tl.exp(top - base)
        weights = tl.exp(lses - base)
        acc = acc * keep + tl.sum(weights[:, None] * x.to(tl.float32), 0)
        total = total * keep + tl.sum(weights, 0)
        top = new_top
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + to_row * HEAD_DIM + offs_d, out, mask=mask_d)
    tl.store(lse_ptr + to_row, tl.where(some, top + tl.log(total), float("-inf")))


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def merge_kernel(
    outs_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    num_parts,
    num_rows,
    HEAD_DIM: tl.constexpr,
):
    """Program (row, -, block of channels): outs [num_parts, num_rows, HEAD_DIM], lses without
    HEAD_DIM."""
    row = tl.program_id(0).to(tl.int64)
    parts, merged = (outs_ptr, lses_ptr), (out_ptr, lse_ptr)
    merge_row(parts, row, num_rows, num_parts, merged, row, HEAD_DIM)


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outs, lses = outs.contiguous(), lses.float().contiguous()
    out = torch.empty_like(outs[0])
    lse = torch.empty_like(lses[0])
    num_parts, num_rows, head_dim = outs.shape[0], lse.numel(), outs.shape[-1]
    if num_rows:
        merge_kernel[(num_rows, 1, channel_blocks(head_dim))](
            outs,
            lses,
            out,
            lse,
            num_parts,
            num_rows,
            HEAD_DIM=head_dim,
            **MERGE_OPTIONS,
        )
    return out, lse
