# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Decode loops over packed pages in the styles of other projects, to count their instructions.

Plain reproductions of how codes become numbers, for `sass.py`: the loop around it, the
pages and the head layout are the same for all, and other features of the originals are left
out. Codes are stored by token, two or four neighbouring channels per byte, with bf16 scales
per token.

where_chain   levels chosen by a chain of comparisons: 4-bit keys, 2-bit values
index_mod     every channel loads its byte and shifts by its index modulo 2; 4 bits
fp32_dots     two halves unpacked, dequantised in fp32, products in fp32 (tf32); 4 bits
"""

from __future__ import annotations

import triton
import triton.language as tl

STYLES = {"where_chain": ("k4v2", 3.0), "index_mod": ("int4", 4.0), "fp32_dots": ("int4", 4.0)}


@triton.jit
def _levels(codes, COUNT: tl.constexpr):
    """Codes -> levels by comparisons; the values of the levels do not affect the count."""
    x = tl.full(codes.shape, -0.5 * COUNT, tl.float32)
    for i in tl.static_range(1, COUNT):
        x = tl.where(codes == i, i * 1.01 - 0.5 * COUNT, x)
    return x


@triton.jit
def _tile(
    page_ptr,
    scale,
    STYLE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """[TOKENS, HEAD_DIM] numbers of the style's dtype."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    MASK: tl.constexpr = (1 << WIDTH) - 1
    offs_n = tl.arange(0, TOKENS)
    offs_d = tl.arange(0, HEAD_DIM)
    row_ptr = page_ptr + offs_n[:, None] * (HEAD_DIM // PER_BYTE)
    if STYLE == "fp32_dots":
        offs = tl.arange(0, HEAD_DIM // 2)
        byte = tl.load(row_ptr + offs[None, :])
        pair = tl.join(byte & MASK, (byte >> WIDTH) & MASK)
        codes = pair.permute(0, 2, 1).reshape(TOKENS, HEAD_DIM)
        return (codes.to(tl.float32) - 8.0) * scale[:, None]
    else:
        byte = tl.load(row_ptr + (offs_d // PER_BYTE)[None, :]).to(tl.int32)
        codes = (byte >> ((offs_d % PER_BYTE) * WIDTH)[None, :]) & MASK
        if STYLE == "where_chain":
            numbers = _levels(codes, 1 << WIDTH)
        else:
            numbers = codes.to(tl.float32) - 8.0
        return (numbers * scale[:, None]).to(tl.bfloat16)


@triton.jit
def style_kernel(
    q_ptr,
    sealed_ptr,
    out_ptr,
    sealed_tables_ptr,
    num_pages,
    qk_scale,
    STYLE: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    K_CODES: tl.constexpr = TOKENS * HEAD_DIM * K_WIDTH // 8
    V_CODES: tl.constexpr = TOKENS * HEAD_DIM * V_WIDTH // 8
    offs_m = tl.arange(0, 16)
    offs_n = tl.arange(0, TOKENS)
    offs_d = tl.arange(0, HEAD_DIM)
    q = tl.load(
        q_ptr + offs_m[:, None] * HEAD_DIM + offs_d[None, :],
        mask=(offs_m < GROUP)[:, None],
        other=0.0,
    )
    if STYLE == "fp32_dots":
        q = q.to(tl.float32)
    acc = tl.zeros([16, HEAD_DIM], dtype=tl.float32)
    total = tl.zeros([16], dtype=tl.float32)
    top = tl.full([16], float("-inf"), dtype=tl.float32)
    for tile in range(num_pages):
        page = tl.load(sealed_tables_ptr + tile).to(tl.int64)
        k_ptr = sealed_ptr + page * (K_CODES + V_CODES + 4 * TOKENS)
        v_ptr = k_ptr + K_CODES
        scales_ptr = (v_ptr + V_CODES).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        k_scale = tl.load(scales_ptr + offs_n).to(tl.float32)
        v_scale = tl.load(scales_ptr + TOKENS + offs_n).to(tl.float32)
        k = _tile(k_ptr, k_scale, STYLE, K_WIDTH, TOKENS, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k)) * qk_scale
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(weights, 1)
        top = new_top
        v = _tile(v_ptr, v_scale, STYLE, V_WIDTH, TOKENS, HEAD_DIM)
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None])
    at = offs_m[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptr + at, acc / total[:, None], mask=(offs_m < GROUP)[:, None])
