"""`write_hot` as one kernel; the same signature as the public operator."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvmesh.kernels.direct import BoundKernels


@triton.jit(do_not_specialize=["slots_ptr"])  # wherever they lie in a step's buffer
def write_kernel(
    k_ptr,
    v_ptr,
    hot_ptr,
    slots_ptr,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    SIDES: tl.constexpr,  # 1 if values are in keys
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD_DIM
        page_row = slot // PAGE_SIZE * (SIDES * NUM_KV_HEADS) + head
        out_ptr = hot_ptr + (page_row * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM + offs_d
        k = tl.load(k_ptr + token * stride_k_token + head * stride_k_head + offs_d, mask=mask_d)
        tl.store(out_ptr, k, mask=mask_d)
        if SIDES == 2:
            v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + offs_d, mask=mask_d)
            tl.store(out_ptr + NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM, v, mask=mask_d)


_writes = BoundKernels(write_kernel, num_warps=1)


def write_hot(k: torch.Tensor, v: torch.Tensor, hot: torch.Tensor, slots: torch.Tensor) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    sizes = (hot.shape[1], num_kv_heads, hot.shape[3], head_dim)
    launch = _writes[*strides, *sizes, triton.next_power_of_2(head_dim)]
    launch((num_tokens, num_kv_heads, 1), k, v, hot, slots)
