"""`sample_tokens` as one kernel; the same signature as the public operator.

A program samples one row. A greedy row is read once. The least weight that top-k and top-p keep is
found without sorting: positive floats are in the order of their bits, so each pass over the row
compares its weights with seven bit patterns and settles three more bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from kvmesh.kernels.sample.op import SampleParams

BLOCK = 2048


@triton.jit
def _weights(logits_ptr, first, vocab, best, inverse, BLOCK: tl.constexpr):
    """Weights of a block of the row, fp32; 0 beyond the vocabulary."""
    offs = first + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + offs, mask=offs < vocab, other=float("-inf"))
    return tl.exp((x - best) * inverse)


@triton.jit
def _limit(
    logits_ptr, vocab, best, inverse, floor, wanted, COUNTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest weight w, of those at least `floor`, such that the weights from w on are at least
    `wanted`: in number if COUNTS, otherwise in sum; and that sum."""
    known = tl.zeros([], tl.int32)  # bits of the limit, from the highest on
    steps = tl.arange(0, 8)
    for settled in range(10):  # weights are at most 1, whose bits are below 2^30
        shift = 27 - 3 * settled
        candidates = known + (steps << shift)
        sums = tl.zeros([8], tl.float64)
        for first in range(0, vocab, BLOCK):
            w = _weights(logits_ptr, first, vocab, best, inverse, BLOCK)
            bits = w.to(tl.int32, bitcast=True)
            from_here = (bits[:, None] >= candidates[None, :]) & (w >= floor)[:, None]
            part = tl.where(from_here, 1.0 if COUNTS else w[:, None], 0.0)
            sums += tl.sum(part, 0).to(tl.float64)
        # Sums fall with rising candidates. The first is always enough.
        enough = sums >= wanted
        best_step = tl.maximum(tl.sum(enough.to(tl.int32), 0) - 1, 0)
        known += best_step << shift
    # The best token's weight is 1, and it is kept in any case.
    return tl.minimum(known.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def _above(logits_ptr, vocab, best, inverse, limit, BLOCK: tl.constexpr):
    """The sum and the number of the weights above `limit`."""
    total = tl.zeros([], tl.float64)
    count = tl.zeros([], tl.float64)
    for first in range(0, vocab, BLOCK):
        w = _weights(logits_ptr, first, vocab, best, inverse, BLOCK)
        total += tl.sum(tl.where(w > limit, w, 0.0), 0).to(tl.float64)
        count += tl.sum((w > limit).to(tl.int32), 0).to(tl.float64)
    return total, count


@triton.jit
def _kept_ties(logits_ptr, vocab, best, inverse, limit, ties, BLOCK: tl.constexpr):
    """The sum of at most `ties` weights that equal `limit`."""
    count = tl.zeros([], tl.float64)
    for first in range(0, vocab, BLOCK):
        w = _weights(logits_ptr, first, vocab, best, inverse, BLOCK)
        count += tl.sum((w == limit).to(tl.int32), 0).to(tl.float64)
    return tl.minimum(count, ties) * limit


@triton.jit(do_not_specialize=["vocab", "stride_row", "num_rows"])
def sample_kernel(
    logits_ptr, params_ptr, tokens_ptr, vocab, stride_row, num_rows, BLOCK: tl.constexpr
):
    """Program (row). params: [5, num_rows] fp64, see `SampleParams`."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride_row
    params_ptr += row
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.zeros([], tl.int32)
    bad = tl.zeros([], tl.int32)
    for first in range(0, vocab, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + offs, mask=offs < vocab, other=float("-inf"))
        bad += tl.sum((x != x).to(tl.int32), 0)
        top = tl.max(x, 0)
        at = tl.min(tl.where((x == top) & (offs < vocab), offs, 2147483647), 0)
        token = tl.where(top > best, at, token)
        best = tl.maximum(best, top)
    sound = (bad == 0) & (best > float("-inf")) & (best < float("inf"))
    temperature = tl.load(params_ptr + num_rows).to(tl.float32)
    if sound & (temperature > 0.0):
        draw = tl.load(params_ptr)
        top_k = tl.load(params_ptr + 2 * num_rows)
        top_p = tl.load(params_ptr + 3 * num_rows)
        inverse = 1.0 / temperature
        # Weights above the limit are kept, and so many of those that equal it.
        limit = tl.full([], -1.0, tl.float32)
        ties = tl.full([], 0.0, tl.float64)
        if (top_k > 0) & (top_k < vocab):
            limit = _limit(logits_ptr, vocab, best, inverse, limit, top_k, True, BLOCK)
            _, count = _above(logits_ptr, vocab, best, inverse, limit, BLOCK)
            ties = top_k - count
        if top_p < 1.0:
            above, _ = _above(logits_ptr, vocab, best, inverse, limit, BLOCK)
            left = top_p * (above + ties * limit)
            found = _limit(logits_ptr, vocab, best, inverse, limit, left, False, BLOCK)
            above, _ = _above(logits_ptr, vocab, best, inverse, found, BLOCK)
            fewer = tl.maximum(tl.ceil((left - above) / found), 1.0)
            ties = tl.where(found > limit, fewer, tl.minimum(fewer, ties))
            limit = tl.maximum(limit, found)
        min_p = tl.load(params_ptr + 4 * num_rows).to(tl.float32)
        ties = tl.where(min_p > limit, 1.0 * vocab, ties)
        limit = tl.maximum(limit, min_p)
        above, _ = _above(logits_ptr, vocab, best, inverse, limit, BLOCK)
        target = draw * (above + _kept_ties(logits_ptr, vocab, best, inverse, limit, ties, BLOCK))
        passed = tl.zeros([], tl.int32)
        before = tl.zeros([], tl.float64)
        found_token = tl.full([], -1, tl.int32)
        last = token
        for first in range(0, vocab, BLOCK):
            if found_token < 0:
                offs = first + tl.arange(0, BLOCK)
                w = _weights(logits_ptr, first, vocab, best, inverse, BLOCK)
                tied = (w == limit).to(tl.int32)
                rank = passed + tl.cumsum(tied, 0)
                passed += tl.sum(tied, 0)
                w = tl.where((w > limit) | ((tied == 1) & (rank <= ties)), w, 0.0)
                sums = before + tl.cumsum(w.to(tl.float64), 0)
                hit = tl.min(tl.where((sums > target) & (w > 0.0), offs, 2147483647), 0)
                found_token = tl.where(hit < vocab, hit, found_token)
                last = tl.maximum(last, tl.max(tl.where(w > 0.0, offs, 0), 0))
                before += tl.sum(w.to(tl.float64), 0)
        # A draw close to 1 can round up to the sum: the last token with a weight.
        token = tl.where(found_token >= 0, found_token, last)
    tl.store(tokens_ptr + row, tl.where(sound, token, -1))


def sample_tokens(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
    num_rows, vocab = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        sample_kernel[(num_rows,)](
            logits,
            params.block,
            tokens,
            vocab,
            logits.stride(0),
            num_rows,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return tokens
