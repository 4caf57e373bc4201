"""`merge_states` as one kernel; the same signature as the public operator."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_P = 16


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
    BLOCK_P: tl.constexpr,
    DECODE: tl.constexpr,
):
    """One row of one head: outs [num_parts, rows, NUM_HEADS, HEAD_DIM], lses without HEAD_DIM.

    stride_part: rows * NUM_HEADS
    DECODE: row r of the parts is sequence r, whose single token is row starts[r] of
        the result; sequences with several tokens are not in the parts
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    to_row = row
    wanted = True
    if DECODE:
        to_row = tl.load(starts_ptr + row).to(tl.int64)
        wanted = tl.load(starts_ptr + row + 1) - to_row == 1
    if wanted:
        offs_p = tl.arange(0, BLOCK_P)
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD_DIM
        top = float("-inf")
        total = 0.0
        acc = tl.zeros([BLOCK_D], dtype=tl.float32)
        for first in range(0, num_parts, BLOCK_P):
            parts = first + offs_p
            at = parts * stride_part + row * NUM_HEADS + head
            lses = tl.load(lses_ptr + at, mask=parts < num_parts, other=float("-inf"))
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
        at = to_row * NUM_HEADS + head
        some = total > 0.0
        total = tl.where(some, total, 1.0)
        acc = acc / total
        tl.store(out_ptr + at * HEAD_DIM + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
        tl.store(lse_ptr + at, tl.where(some, top + tl.log(total), float("-inf")))


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outs, lses = outs.contiguous(), lses.float().contiguous()
    out = torch.empty_like(outs[0])
    lse = torch.empty_like(lses[0])
    if outs.shape[1]:
        _launch(outs, lses, out, lse, lses, decode=False)
    return out, lse


def merge_decode(
    outs: torch.Tensor,
    lses: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_starts: torch.Tensor,
) -> None:
    """Merge parts [num_parts, num_seqs, num_heads(, head_dim)] into the rows of out and lse that
    belong to decoding sequences; query_starts as in `AttentionBatch`."""
    _launch(outs, lses, out, lse, query_starts, decode=True)


def _launch(
    outs: torch.Tensor,
    lses: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    starts: torch.Tensor,
    *,
    decode: bool,
) -> None:
    num_parts, rows, num_heads, head_dim = outs.shape
    merge_kernel[(rows, num_heads)](
        outs,
        lses,
        out,
        lse,
        starts,
        num_parts,
        rows * num_heads,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_P=BLOCK_P,
        DECODE=decode,
        num_warps=4 if num_parts > BLOCK_P else 1,
    )
