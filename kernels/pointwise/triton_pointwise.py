"""The operators as one kernel each; the same signatures as the public ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvmesh.kernels.direct import BoundKernels

BLOCK = 2048


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Program (row). x, residual, out: [rows, SIZE]"""
    row = tl.program_id(0).to(tl.int64) * SIZE
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    x = tl.load(x_ptr + row + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row + offs, mask=mask, other=0.0).to(tl.float32)
        # The norm is of what the next layer reads.
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row + offs, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = x * scale * weight
    tl.store(out_ptr + row + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_kernel(both_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block of channels). both: [rows, 2 SIZE]; out: [rows, SIZE]"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    gate = tl.load(both_ptr + row * (2 * SIZE) + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * (2 * SIZE) + SIZE + offs, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * SIZE + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halves(ptr, offs, mask, cos, sin, HALF: tl.constexpr):
    """A head's two halves, rotated, fp32."""
    first = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + HALF + offs, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize=["slots_ptr"])  # wherever they lie in a step's buffer
def rope_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    hot_ptr,
    slots_ptr,
    out_ptr,
    stride_q_token,
    stride_k_token,
    stride_v_token,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, query head, or NUM_HEADS + KV head). Heads are HEAD_DIM apart in q, k, v."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    offs = tl.arange(0, BLOCK)
    mask = offs < HALF
    cos = tl.load(cos_ptr + token * HEAD_DIM + offs, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HEAD_DIM + offs, mask=mask, other=0.0).to(tl.float32)
    if head < NUM_HEADS:
        from_ptr = q_ptr + token * stride_q_token + head * HEAD_DIM
        first, second = _halves(from_ptr, offs, mask, cos, sin, HALF)
        to_ptr = out_ptr + (token * NUM_HEADS + head) * HEAD_DIM
        tl.store(to_ptr + offs, first.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(to_ptr + HALF + offs, second.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            kv_head = head - NUM_HEADS
            page_row = slot // PAGE_SIZE * (2 * NUM_KV_HEADS) + kv_head
            to_ptr = hot_ptr + (page_row * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM
            from_ptr = k_ptr + token * stride_k_token + kv_head * HEAD_DIM
            first, second = _halves(from_ptr, offs, mask, cos, sin, HALF)
            tl.store(to_ptr + offs, first.to(hot_ptr.dtype.element_ty), mask=mask)
            tl.store(to_ptr + HALF + offs, second.to(hot_ptr.dtype.element_ty), mask=mask)
            to_ptr += NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM
            from_ptr = v_ptr + token * stride_v_token + kv_head * HEAD_DIM
            tl.store(to_ptr + offs, tl.load(from_ptr + offs, mask=mask), mask=mask)
            tl.store(to_ptr + HALF + offs, tl.load(from_ptr + HALF + offs, mask=mask), mask=mask)


_norms = BoundKernels(norm_kernel, num_warps=8)
_silu_muls = BoundKernels(silu_mul_kernel, num_warps=4)
_rope_writes = BoundKernels(rope_write_kernel, num_warps=1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.contiguous()  # it may be a part of a projection
    return _norm(x, x, weight, eps, add=False)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return _norm(x, residual, weight, eps, add=True)


def _norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, add: bool
) -> torch.Tensor:
    size = x.shape[-1]
    out = torch.empty_like(x)
    launch = _norms[eps, size, triton.next_power_of_2(size), add]
    launch((x.numel() // size, 1, 1), x, residual, weight, out)
    return out


def silu_mul(both: torch.Tensor) -> torch.Tensor:
    size = both.shape[-1] // 2
    out = both.new_empty((*both.shape[:-1], size))
    _silu_muls[size, BLOCK]((out.numel() // size, -(-size // BLOCK), 1), both, out)
    return out


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    hot: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = q.new_empty(q.shape)
    strides = (q.stride(0), k.stride(0), v.stride(0))
    sizes = (num_heads, num_kv_heads, hot.shape[3], head_dim)
    launch = _rope_writes[*strides, *sizes, triton.next_power_of_2(head_dim // 2)]
    launch((num_tokens, num_heads + num_kv_heads, 1), q, k, v, cos, sin, hot, slots, out)
    return out
