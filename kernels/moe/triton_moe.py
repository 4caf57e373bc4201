"""`expert_mlp` as two grouped products; the same signature as the public operator.

Assignments (a token and one of its experts) are sorted by expert. A program computes one
tile of BLOCK_M assignments of one expert. As counts are known only on the device, the grid
has as many programs as the worst case needs, and those without work end at once:

    assignments   0 1 2 3 4 | 5 6 | 7          sorted; experts 0, 2 and 5
    blocks        0     1   | 2   | 3 (none)   BLOCK_M = 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvmesh.kernels.moe.glu import GatedUnit
from kvmesh.kernels.moe.reference import in_order

# Of a tile whose shape must not depend on the batch: tensor cores may sum in another order for
# another number of rows.
FIXED_ROWS = 64


@triton.jit
def gate_up_kernel(
    x_ptr,
    order_ptr,
    starts_ptr,
    block_starts_ptr,
    block_experts_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_experts,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [assignments, WIDTH], sorted: the gated unit of each assignment.

    x [tokens, HIDDEN]; weight [num_experts, 2 * WIDTH, HIDDEN]; bias [num_experts, 2 * WIDTH]
    """
    block = tl.program_id(0)
    expert = tl.load(block_experts_ptr + block)
    if expert < num_experts:
        first = (block - tl.load(block_starts_ptr + expert)) * BLOCK_M
        offs_m = tl.load(starts_ptr + expert) + first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < tl.load(starts_ptr + expert + 1)
        tokens = (tl.load(order_ptr + offs_m, mask=mask_m, other=0) // TOP_K).to(tl.int64)
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < WIDTH
        rows = expert.to(tl.int64) * (2 * WIDTH) + offs_n
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < HIDDEN
            x = tl.load(
                x_ptr + tokens[:, None] * HIDDEN + offs_k[None, :],
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )
            at = weight_ptr + rows[None, :] * HIDDEN + offs_k[:, None]
            mask = mask_k[:, None] & mask_n[None, :]
            gate = tl.dot(x, tl.load(at, mask=mask, other=0.0), gate, input_precision=PRECISION)
            w_up = tl.load(at + WIDTH * HIDDEN, mask=mask, other=0.0)
            up = tl.dot(x, w_up, up, input_precision=PRECISION)
        if HAS_BIAS:
            gate += tl.load(bias_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + rows + WIDTH, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if HAS_LIMIT:
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
    order_ptr,
    starts_ptr,
    block_starts_ptr,
    block_experts_ptr,
    weight_ptr,
    bias_ptr,
    shares_ptr,
    out_ptr,
    num_experts,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [assignments, HIDDEN] fp32, in the order of tokens: each one's share of its token.

    x [assignments, WIDTH], sorted; weight [num_experts, HIDDEN, WIDTH]; bias [num_experts,
    HIDDEN]; shares [assignments] fp32, in the order of tokens
    """
    block = tl.program_id(0)
    expert = tl.load(block_experts_ptr + block)
    if expert < num_experts:
        first = (block - tl.load(block_starts_ptr + expert)) * BLOCK_M
        offs_m = tl.load(starts_ptr + expert) + first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < tl.load(starts_ptr + expert + 1)
        places = tl.load(order_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < HIDDEN
        rows = expert.to(tl.int64) * HIDDEN + offs_n
        out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < WIDTH
            x = tl.load(
                x_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_k[None, :],
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )
            w = tl.load(
                weight_ptr + rows[None, :] * WIDTH + offs_k[:, None],
                mask=mask_k[:, None] & mask_n[None, :],
                other=0.0,
            )
            out = tl.dot(x, w, out, input_precision=PRECISION)
        if HAS_BIAS:
            out += tl.load(bias_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)[None, :]
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
    gate_up: torch.Tensor,
    down: torch.Tensor,
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
        block_m = FIXED_ROWS if deterministic else block_rows(num_tokens * top_k, num_experts)
        groups = _Groups.of(experts, num_experts, block_m)
        x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
        inner = torch.empty(num_tokens * top_k, width, dtype=x.dtype, device=x.device)
        common = tiles(x.dtype, block_m)
        block_n = common["BLOCK_N"]
        gate_up_kernel[(groups.num_blocks, triton.cdiv(width, block_n))](
            x,
            *groups.pointers,
            gate_up,
            x if gate_up_bias is None else gate_up_bias.contiguous(),
            inner,
            num_experts,
            TOP_K=top_k,
            HIDDEN=hidden,
            WIDTH=width,
            HAS_BIAS=gate_up_bias is not None,
            **unit(glu),
            **common,
        )
        down_kernel[(groups.num_blocks, triton.cdiv(hidden, block_n))](
            inner,
            *groups.pointers,
            down,
            x if down_bias is None else down_bias.contiguous(),
            weights.float().contiguous(),
            parts,
            num_experts,
            HIDDEN=hidden,
            WIDTH=width,
            HAS_BIAS=down_bias is not None,
            **common,
        )
    shares = parts.view(num_tokens, top_k, hidden)
    return (in_order(shares) if deterministic else shares.sum(1)).to(x.dtype)


def block_rows(assignments: int, num_experts: int) -> int:
    """Rows of a tile, from shapes alone: about as many as an expert has assignments."""
    mean = -(-assignments // num_experts)
    return min(128, max(16, 1 << (mean - 1).bit_length()))


def tiles(dtype: torch.dtype, block_m: int) -> dict[str, object]:
    """Constants and options of both kernels."""
    wide = dtype == torch.float32
    return {
        "PRECISION": "ieee" if wide else "tf32",
        "BLOCK_M": block_m,
        "BLOCK_N": 64,
        "BLOCK_K": 32 if wide else 64,
        "num_warps": 4 if block_m <= 64 else 8,
        "num_stages": 3,
    }


def unit(glu: GatedUnit) -> dict[str, object]:
    """The gated unit as constants of `gate_up_kernel`."""
    return {
        "ALPHA": glu.alpha,
        "SHIFT": glu.shift,
        "LIMIT": glu.limit or 0.0,
        "HAS_LIMIT": glu.limit is not None,
    }


@dataclass(frozen=True, slots=True)
class _Groups:
    """Assignments by expert; see the module.

    order: [assignments] int64, sorted by expert
    starts, block_starts: [num_experts + 1] int32, each expert's first assignment and block
    block_experts: [num_blocks] int32; num_experts for blocks without work
    """

    order: torch.Tensor
    starts: torch.Tensor
    block_starts: torch.Tensor
    block_experts: torch.Tensor

    @property
    def num_blocks(self) -> int:
        return self.block_experts.shape[0]

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        return self.order, self.starts, self.block_starts, self.block_experts

    @staticmethod
    def of(experts: torch.Tensor, num_experts: int, block_m: int) -> _Groups:
        flat = experts.reshape(-1)
        elsewhere = (flat < 0) | (flat >= num_experts)
        flat = torch.where(elsewhere, num_experts, flat)
        counts = flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))
        counts = counts[:num_experts]
        ends = counts.cumsum(0)
        block_ends = ((counts + block_m - 1) // block_m).cumsum(0)
        num_blocks = min(flat.shape[0], flat.shape[0] // block_m + num_experts)
        blocks = torch.arange(num_blocks, device=flat.device)
        return _Groups(
            torch.argsort(flat, stable=True),
            torch.cat((ends.new_zeros(1), ends)).int(),
            torch.cat((ends.new_zeros(1), block_ends)).int(),
            torch.searchsorted(block_ends, blocks, right=True).int(),
        )
