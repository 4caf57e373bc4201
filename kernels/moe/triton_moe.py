"""`expert_mlp` as two grouped products; the same signature as the public operator.

Assignments (a token and one of its experts) are sorted by expert. A program computes one
tile of BLOCK_M assignments of one expert. As counts are known only on the device, the grid
has as many programs as the worst case needs, and those without work end at once:

    assignments   0 1 2 3 4 | 5 6 | 7          sorted; experts 0, 2 and 5
    blocks        0     1   | 2   | 3 (none)   BLOCK_M = 4
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvmesh.kernels.linear import GroupedWeight, triton_tiles
from kvmesh.kernels.linear.triton_tiles import (
    WeightForm,
    decode,
    expert_of,
    inputs_of,
    load_codes,
    pointers,
    product,
    weight_form,
)
from kvmesh.kernels.moe.glu import GatedUnit
from kvmesh.kernels.moe.reference import in_order

# Of a tile whose shape must not depend on the batch: tensor cores may sum in another order for
# another number of rows.
FIXED_ROWS = 64

BLOCK_N = 64  # outputs of a tile


class Groups(NamedTuple):
    """Assignments by expert; see the module.

    order: [assignments] int64, sorted by expert
    starts, block_starts: [num_experts + 1] int32, each expert's first assignment and block
    block_experts: [num_blocks] int32; num_experts for blocks without work
    """

    order: torch.Tensor
    starts: torch.Tensor
    block_starts: torch.Tensor
    block_experts: torch.Tensor

    @staticmethod
    def of(experts: torch.Tensor, num_experts: int, block_m: int) -> Groups:
        flat = experts.reshape(-1)
        elsewhere = (flat < 0) | (flat >= num_experts)
        flat = torch.where(elsewhere, num_experts, flat)
        counts = flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))
        counts = counts[:num_experts]
        ends = counts.cumsum(0)
        block_ends = ((counts + block_m - 1) // block_m).cumsum(0)
        num_blocks = min(flat.shape[0], flat.shape[0] // block_m + num_experts)
        blocks = torch.arange(num_blocks, device=flat.device)
        return Groups(
            torch.argsort(flat, stable=True),
            torch.cat((ends.new_zeros(1), ends)).int(),
            torch.cat((ends.new_zeros(1), block_ends)).int(),
            torch.searchsorted(block_ends, blocks, right=True).int(),
        )


@triton.jit
def _assignments(groups, expert, BLOCK_M: tl.constexpr):
    """This program's assignments, [BLOCK_M], and which of them exist; axis 0 of the grid"""
    first = (tl.program_id(0) - tl.load(groups.block_starts + expert)) * BLOCK_M
    offs_m = tl.load(groups.starts + expert) + first + tl.arange(0, BLOCK_M)
    return offs_m, offs_m < tl.load(groups.starts + expert + 1)


@triton.jit
def gate_up_kernel(
    x_ptr,
    groups,
    weights,
    bias_ptr,
    out_ptr,
    num_experts,
    TOP_K: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    FORM: tl.constexpr,
):
    """out [assignments, width], sorted: the gated unit of each assignment (ALPHA, LIMIT and SHIFT
    as in `GatedUnit`).

    x [tokens, hidden]; groups: `Groups`; weights: of [num_experts, 2 * width, hidden]; bias
    [num_experts, 2 * width]
    """
    BLOCK_M: tl.constexpr = FORM.block_m
    BLOCK_N: tl.constexpr = FORM.block_n
    BLOCK_K: tl.constexpr = FORM.block_k
    HALVES: tl.constexpr = FORM.halves
    HIDDEN: tl.constexpr = FORM.inputs
    WIDTH: tl.constexpr = FORM.outputs // 2
    expert = tl.load(groups.block_experts + tl.program_id(0))
    if expert < num_experts:
        offs_m, mask_m = _assignments(groups, expert, BLOCK_M)
        tokens = (tl.load(groups.order + offs_m, mask=mask_m, other=0) // TOP_K).to(tl.int64)
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < WIDTH
        ups = offs_n + WIDTH
        weight = expert_of(weights, expert, FORM)
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            gate_codes = load_codes(weight, start, offs_n, mask_n, FORM)
            up_codes = load_codes(weight, start, ups, mask_n, FORM)
            for half in tl.static_range(HALVES):
                offs_k = inputs_of(start, half, FORM)
                x = tl.load(
                    x_ptr + tokens[:, None] * HIDDEN + offs_k[None, :],
                    mask=mask_m[:, None] & (offs_k < HIDDEN)[None, :],
                    other=0.0,
                )
                w = decode(weight, gate_codes, half, start, offs_k, offs_n, mask_n, x.dtype, FORM)
                gate = tl.dot(x, w, gate, input_precision=PRECISION)
                w = decode(weight, up_codes, half, start, offs_k, ups, mask_n, x.dtype, FORM)
                up = tl.dot(x, w, up, input_precision=PRECISION)
        if HAS_BIAS:
            bias = bias_ptr + expert.to(tl.int64) * (2 * WIDTH) + offs_n
            gate += tl.load(bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + WIDTH, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        out = gate * tl.sigmoid(gate * ALPHA) * (up + SHIFT)
        tl.store(
            out_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_n[None, :],
        )


@triton.jit
def down_kernel(
    x_ptr,
    groups,
    weights,
    bias_ptr,
    shares_ptr,
    out_ptr,
    num_experts,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    FORM: tl.constexpr,
):
    """out [assignments, hidden] fp32, in the order of tokens: each one's share of its token.

    x [assignments, width], sorted; groups: `Groups`; weights: of [num_experts, hidden, width]
    bias [num_experts, hidden]; shares [assignments] fp32, in the order of tokens
    """
    BLOCK_M: tl.constexpr = FORM.block_m
    BLOCK_N: tl.constexpr = FORM.block_n
    HIDDEN: tl.constexpr = FORM.outputs
    WIDTH: tl.constexpr = FORM.inputs
    expert = tl.load(groups.block_experts + tl.program_id(0))
    if expert < num_experts:
        offs_m, mask_m = _assignments(groups, expert, BLOCK_M)
        places = tl.load(groups.order + offs_m, mask=mask_m, other=0).to(tl.int64)
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < HIDDEN
        weight = expert_of(weights, expert, FORM)
        x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * WIDTH
        out = product(x_rows, mask_m, weight, offs_n, mask_n, 0, WIDTH, PRECISION, FORM)
        if HAS_BIAS:
            bias = bias_ptr + expert.to(tl.int64) * HIDDEN + offs_n
            out += tl.load(bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        out *= tl.load(shares_ptr + places, mask=mask_m, other=0.0)[:, None]
        tl.store(
            out_ptr + places[:, None] * HIDDEN + offs_n[None, :],
            out,
            mask=mask_m[:, None] & mask_n[None, :],
        )


def expert_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | GroupedWeight,
    down: torch.Tensor | GroupedWeight,
    *,
    glu: GatedUnit,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    deterministic: bool,
) -> torch.Tensor:
    num_tokens, top_k = experts.shape
    num_experts, hidden, width = down.shape
    parts = torch.zeros(num_tokens * top_k, hidden, dtype=torch.float32, device=x.device)
    if num_tokens:
        # From shapes alone: about as many rows as an expert has assignments.
        mean = -(-num_tokens * top_k // num_experts)
        block_m = FIXED_ROWS if deterministic else triton_tiles.block_rows(mean)
        groups = Groups.of(experts, num_experts, block_m)
        x = x.contiguous()
        if isinstance(gate_up, torch.Tensor):
            gate_up, down = gate_up.contiguous(), down.contiguous()
        inner = torch.empty(num_tokens * top_k, width, dtype=x.dtype, device=x.device)
        inward, outward = (weight_form(weight, block_m, BLOCK_N) for weight in (gate_up, down))
        gate_up_kernel[(len(groups.block_experts), triton.cdiv(width, BLOCK_N))](
            x,
            groups,
            pointers(gate_up),
            x if gate_up_bias is None else gate_up_bias.contiguous(),
            inner,
            num_experts,
            TOP_K=top_k,
            HAS_BIAS=gate_up_bias is not None,
            FORM=inward,
            ALPHA=glu.alpha,
            LIMIT=glu.limit,
            SHIFT=glu.shift,
            **options(inward, x.dtype),
        )
        down_kernel[(len(groups.block_experts), triton.cdiv(hidden, BLOCK_N))](
            inner,
            groups,
            pointers(down),
            x if down_bias is None else down_bias.contiguous(),
            weights.float().contiguous(),
            parts,
            num_experts,
            HAS_BIAS=down_bias is not None,
            FORM=outward,
            **options(outward, x.dtype),
        )
    shares = parts.view(num_tokens, top_k, hidden)
    return (in_order(shares) if deterministic else shares.sum(1)).to(x.dtype)


def options(form: WeightForm, dtype: torch.dtype) -> dict[str, object]:
    """How both kernels are compiled."""
    return {**triton_tiles.options(form, dtype), "num_stages": 3}
