"""`merge_states` as one kernel; the same signature as the public operator."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    outs_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    starts_ptr,
    num_parts,
    stride_part,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DECODE: tl.constexpr,
):
    """One row of one head: outs [num_parts, rows, NUM_HEADS, HEAD_DIM], lses without HEAD_DIM.

    stride_part: rows * NUM_HEADS
    DECODE: row r of the parts is sequence r, whose one token is row starts[r] of
        the result; a sequence of several tokens is not in the parts at all
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    to_row = row
    wanted = True
    if DECODE:
        to_row = tl.load(starts_ptr + row).to(tl.int64)
        wanted = tl.load(starts_ptr + row + 1) - to_row == 1
    if wanted:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD_DIM
        top = float("-inf")
        total = 0.0
        acc = tl.zeros([BLOCK_D], dtype=tl.float32)
        at = row * NUM_HEADS + head
        for _ in range(num_parts):
            lse = tl.load(lses_ptr + at)
            if lse != float("-inf"):
                x = tl.load(outs_ptr + at * HEAD_DIM + offs_d, mask=mask_d, other=0.0)
                new_top = tl.maximum(top, lse)
                keep = tl.exp(top - new_top)
                weight = tl.exp(lse - new_top)
                acc = acc * keep + weight * x.to(tl.float32)
                total = total * keep + weight
                top = new_top
            at += stride_part
        at = to_row * NUM_HEADS + head
        some = total > 0.0
        total = tl.where(some, total, 1.0)
        acc = acc / total
        tl.store(out_ptr + at * HEAD_DIM + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
        tl.store(lse_ptr + at, tl.where(some, top + tl.log(total), float("-inf")))


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_parts, num_tokens, num_heads, head_dim = outs.shape
    outs, lses = outs.contiguous(), lses.float().contiguous()
    out = torch.empty_like(outs[0])
    lse = torch.empty_like(lses[0])
    if num_tokens:
        merge_kernel[(num_tokens, num_heads)](
            outs,
            lses,
            out,
            lse,
            lses,
            num_parts,
            num_tokens * num_heads,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            DECODE=False,
            num_warps=1,
        )
    return out, lse
