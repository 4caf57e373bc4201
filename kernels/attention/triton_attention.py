"""`paged_attention` in Triton: one attention loop for every format, decode and prefill.

A program attends a block of rows, (query token, query head of one KV head's
group) pairs, over a share of the keys. Keys come in two ranges of positions,

    sealed   [sink, Pl - recent)                 pages; Pl that of the block's last query
    hot      [0, sink) and [Pf - recent, end)    Pf that of its first

and each row masks what it does not see in that form. For decode a block is one
token and Pf = Pl; `num_splits` programs share its keys, and `merge_kernel` joins
them by log-sum-exp (FlashDecoding). For prefill a block is 64 rows or more, so
that unpacking a tile of sealed keys is shared by all of them.

Formats supply `LOAD` (see their `triton` modules): tiles in two halves of the
head's dimensions. Where a format is affine, scale and offset are folded,

    q·k^ = scale (q·tile) + offset Σq        Σ p v^ = Σ (p scale) tile + Σ p offset

so that no key or value is ever dequantised. Grids and loop bounds follow from
the host's upper bounds and from lengths read on the device: nothing is read
back, and a captured graph stays right for other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.merge.triton_merge import merge_kernel

LOG2_E = 1.4426950408889634
MAX_SPLITS = 128
MIN_TILES_PER_SPLIT = 4
MAX_BLOCK_N = 64
PREFILL_ROWS = 64
INTERPRETER_PROCESSORS = 8  # what the interpreter pretends to split for


@triton.jit
def _load_hot(
    hot_ptr,
    page_row,
    slots,
    mask,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """A tile of hot keys or values, in halves; the page row tells which, the mask what is there."""
    offs_d = tl.arange(0, HALF)
    mask_d = mask[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
    row_ptr = hot_ptr + page_row * (PAGE_SIZE * HEAD_DIM)
    row_ptr += slots[:, None] * HEAD_DIM + offs_d[None, :]
    low = tl.load(row_ptr, mask=mask_d, other=0.0)
    high = tl.load(row_ptr + HEAD_DIM // 2, mask=mask_d, other=0.0)
    return low, high


@triton.jit
def _attend_tile(
    q_low,
    q_high,
    q_sum,
    q_pos,
    acc_low,
    acc_high,
    acc_offset,
    top,
    total,
    data_ptr,
    meta_ptr,
    k_row,
    v_row,
    first_key,
    least_key,
    end_key,
    qk_scale,
    softcap,
    window,
    sink_pages,
    recent_pages,
    LOAD: tl.constexpr,
    AFFINE: tl.constexpr,
    HOT: tl.constexpr,
    DECODE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of BLOCK_N keys of one page, positions [least_key, end_key) of it valid."""
    offs_n = tl.arange(0, BLOCK_N)
    keys = first_key + offs_n
    slots = first_key % PAGE_SIZE + offs_n
    mask = (keys >= least_key) & (keys < end_key)
    if HOT:
        k_low, k_high = _load_hot(data_ptr, k_row, slots, mask, PAGE_SIZE, HEAD_DIM, HALF)
        k_scale, k_offset = 1.0, 0.0
    else:
        k_low, k_high, k_scale, k_offset = LOAD(
            data_ptr, meta_ptr, k_row, slots, 0, PAGE_SIZE, HEAD_DIM, HALF, DTYPE
        )
    scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
    scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION)
    if AFFINE:
        scores = scores * (k_scale * qk_scale)[None, :]
        scores += q_sum[:, None] * (k_offset * qk_scale)[None, :]
    else:
        scores = scores * qk_scale
    if HAS_SOFTCAP:
        # tanh(x) = 2 sigmoid(2x) - 1; scores are natural until here
        scores = (2.0 * tl.sigmoid(scores * (2.0 / softcap)) - 1.0) * (softcap * 1.4426950408889634)
    # Sealed tiles are whole: a decoding query without a window sees all of each.
    if HOT or HAS_WINDOW or not DECODE:
        page = first_key // PAGE_SIZE
        edge = q_pos // PAGE_SIZE - recent_pages
        if HOT:
            seen = (page < sink_pages) | (page >= edge)
            visible = mask[None, :] & seen[:, None] & (keys[None, :] <= q_pos[:, None])
        else:
            visible = mask[None, :] & (page < edge)[:, None]
        if HAS_WINDOW:
            visible = visible & (q_pos[:, None] - keys[None, :] < window)
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf; subtract 0 there, not inf from inf.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    keep = tl.exp2(top - base)
    total = total * keep + tl.sum(weights, 1)
    if HOT:
        v_low, v_high = _load_hot(data_ptr, v_row, slots, mask, PAGE_SIZE, HEAD_DIM, HALF)
        v_scale, v_offset = 1.0, 0.0
    else:
        v_low, v_high, v_scale, v_offset = LOAD(
            data_ptr, meta_ptr, v_row, slots, 1, PAGE_SIZE, HEAD_DIM, HALF, DTYPE
        )
    if AFFINE:
        acc_offset = acc_offset * keep + tl.sum(weights * v_offset[None, :], 1)
        weights = weights * v_scale[None, :]
    else:
        acc_offset = acc_offset * keep
    weights = weights.to(DTYPE)
    acc_low = tl.dot(weights, v_low, acc_low * keep[:, None], input_precision=PRECISION)
    acc_high = tl.dot(weights, v_high, acc_high * keep[:, None], input_precision=PRECISION)
    return acc_low, acc_high, acc_offset, new_top, total


@triton.jit
def attention_kernel(
    q_ptr,
    hot_ptr,
    data_ptr,
    meta_ptr,
    out_ptr,
    lse_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    rows_ptr,
    hot_tables_ptr,
    sealed_tables_ptr,
    stride_table,
    stride_split,
    qk_scale,
    softcap,
    window,
    sink_pages,
    recent_pages,
    num_splits,
    LOAD_SEALED: tl.constexpr,
    AFFINE: tl.constexpr,
    DECODE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (split or query block, KV head, sequence).

    DECODE: sequences with one new token; out and lse are partial, fp32
        [num_splits, num_seqs, num_heads, HEAD_DIM] and without HEAD_DIM.
        Otherwise sequences with more; out and lse are the operator's.
    """
    head = tl.program_id(1)
    seq = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + seq)
    num_queries = tl.load(query_starts_ptr + seq + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + seq)
    if DECODE:
        split = tl.program_id(0)
        block = 0
        wanted = num_queries == 1
    else:
        split = 0
        block = tl.program_id(0)
        wanted = (num_queries > 1) & (block * BLOCK_Q < num_queries)
    if wanted:
        DTYPE: tl.constexpr = q_ptr.dtype.element_ty
        NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
        offs_m = tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, HALF)
        token = block * BLOCK_Q + offs_m // GROUP
        q_head = head * GROUP + offs_m % GROUP
        mask_m = (offs_m < BLOCK_Q * GROUP) & (token < num_queries)
        mask_q = mask_m[:, None] & (offs_d < HEAD_DIM // 2)[None, :]
        q_row = (query_start + token).to(tl.int64) * NUM_HEADS + q_head
        q_row_ptr = q_ptr + q_row[:, None] * HEAD_DIM + offs_d[None, :]
        q_low = tl.load(q_row_ptr, mask=mask_q, other=0.0)
        q_high = tl.load(q_row_ptr + HEAD_DIM // 2, mask=mask_q, other=0.0)
        q_sum = tl.sum(q_low.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)

        # Positions: rows beyond the block take its first query's, so that they see something.
        past = seq_len - num_queries
        q_pos = past + tl.where(mask_m, token, block * BLOCK_Q)
        first_pos = past + block * BLOCK_Q
        last_pos = tl.minimum(first_pos + BLOCK_Q, seq_len) - 1
        seen_from = 0
        if HAS_WINDOW:
            seen_from = tl.maximum(first_pos - window + 1, 0)
        sealed_from = tl.maximum(sink_pages * PAGE_SIZE, seen_from)
        sealed_end = (last_pos // PAGE_SIZE - recent_pages) * PAGE_SIZE
        sink_end = tl.minimum(sink_pages * PAGE_SIZE, last_pos + 1)
        recent_from = (first_pos // PAGE_SIZE - recent_pages) * PAGE_SIZE
        recent_from = tl.maximum(tl.maximum(recent_from, sink_pages * PAGE_SIZE), seen_from)

        # Tiles: sealed ones, then those of the sink, then the recent ones.
        sealed_tile = sealed_from // BLOCK_N
        sink_tile = seen_from // BLOCK_N
        recent_tile = recent_from // BLOCK_N
        num_sealed = tl.maximum(sealed_end // BLOCK_N - sealed_tile, 0)
        num_sink = tl.maximum((sink_end + BLOCK_N - 1) // BLOCK_N - sink_tile, 0)
        num_recent = tl.maximum(last_pos // BLOCK_N + 1 - recent_tile, 0)
        num_tiles = num_sealed + num_sink + num_recent
        per_split = num_tiles
        if DECODE:
            per_split = (num_tiles + num_splits - 1) // num_splits
        tile_from = split * per_split
        tile_end = tl.minimum(tile_from + per_split, num_tiles)

        table = tl.load(rows_ptr + seq).to(tl.int64) * stride_table
        acc_low = tl.zeros([BLOCK_M, HALF], dtype=tl.float32)
        acc_high = tl.zeros([BLOCK_M, HALF], dtype=tl.float32)
        acc_offset = tl.zeros([BLOCK_M], dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

        for tile in range(tile_from, tl.minimum(tile_end, num_sealed)):
            first_key = (sealed_tile + tile) * BLOCK_N
            page = tl.load(sealed_tables_ptr + table + first_key // PAGE_SIZE).to(tl.int64)
            page_row = page * NUM_KV_HEADS + head
            acc_low, acc_high, acc_offset, top, total = _attend_tile(
                q_low,
                q_high,
                q_sum,
                q_pos,
                acc_low,
                acc_high,
                acc_offset,
                top,
                total,
                data_ptr,
                meta_ptr,
                page_row,
                page_row,
                first_key,
                sealed_from,
                sealed_end,
                qk_scale,
                softcap,
                window,
                sink_pages,
                recent_pages,
                LOAD_SEALED,
                AFFINE,
                False,
                DECODE,
                HAS_SOFTCAP,
                HAS_WINDOW,
                PAGE_SIZE,
                HEAD_DIM,
                HALF,
                BLOCK_N,
                DTYPE,
                PRECISION,
            )
        for tile in range(tl.maximum(tile_from, num_sealed), tile_end):
            index = tile - num_sealed
            in_sink = index < num_sink
            first_key = tl.where(in_sink, sink_tile + index, recent_tile + index - num_sink)
            first_key = first_key * BLOCK_N
            least_key = tl.where(in_sink, seen_from, recent_from)
            end_key = tl.where(in_sink, sink_end, last_pos + 1)
            page = tl.load(hot_tables_ptr + table + first_key // PAGE_SIZE).to(tl.int64)
            # A hot page is all heads' keys, then all heads' values: seen as exact
            # pages of keys alone, each half as large.
            k_row = page * (2 * NUM_KV_HEADS) + head
            acc_low, acc_high, acc_offset, top, total = _attend_tile(
                q_low,
                q_high,
                q_sum,
                q_pos,
                acc_low,
                acc_high,
                acc_offset,
                top,
                total,
                hot_ptr,
                hot_ptr,
                k_row,
                k_row + NUM_KV_HEADS,
                first_key,
                least_key,
                end_key,
                qk_scale,
                softcap,
                window,
                sink_pages,
                recent_pages,
                LOAD_SEALED,
                False,
                True,
                DECODE,
                HAS_SOFTCAP,
                HAS_WINDOW,
                PAGE_SIZE,
                HEAD_DIM,
                HALF,
                BLOCK_N,
                DTYPE,
                PRECISION,
            )

        some = total > 0.0
        total = tl.where(some, total, 1.0)
        norm = 1.0 / total
        low = (acc_low + acc_offset[:, None]) * norm[:, None]
        high = (acc_high + acc_offset[:, None]) * norm[:, None]
        lse = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        if DECODE:
            out_row = split.to(tl.int64) * stride_split + seq * NUM_HEADS + q_head
        else:
            out_row = q_row
        out_row_ptr = out_ptr + out_row[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(out_row_ptr, low.to(out_ptr.dtype.element_ty), mask=mask_q)
        tl.store(out_row_ptr + HEAD_DIM // 2, high.to(out_ptr.dtype.element_ty), mask=mask_q)
        tl.store(lse_ptr + out_row, lse, mask=mask_m)


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is compiled: its constants but for the layer's flags, warps and stages."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@cache
def decode_launch(fmt: KVFormat, head_dim: int, group: int, page_size: int) -> Launch:
    """group: query heads of a KV head"""
    block_m = max(16, triton.next_power_of_2(group))
    return _launch(fmt, head_dim, group, page_size, decode=True, block_q=1, block_m=block_m)


@cache
def prefill_launch(fmt: KVFormat, head_dim: int, group: int, page_size: int) -> Launch:
    """group: query heads of a KV head"""
    block_q = max(1, PREFILL_ROWS // group)
    block_m = triton.next_power_of_2(block_q * group)
    return _launch(fmt, head_dim, group, page_size, decode=False, block_q=block_q, block_m=block_m)


def _launch(
    fmt: KVFormat,
    head_dim: int,
    group: int,
    page_size: int,
    *,
    decode: bool,
    block_q: int,
    block_m: int,
) -> Launch:
    kernels = fmt.tile_kernels()
    constants = {
        "LOAD_SEALED": kernels.load_tile,
        "AFFINE": kernels.affine,
        "DECODE": decode,
        "HAS_SOFTCAP": False,
        "HAS_WINDOW": False,
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "HEAD_DIM": head_dim,
        "HALF": triton.next_power_of_2(head_dim // 2),
        "BLOCK_Q": block_q,
        "BLOCK_M": block_m,
        "BLOCK_N": min(MAX_BLOCK_N, page_size & -page_size),
        "PRECISION": "ieee",
    }
    return Launch(constants, num_warps=4, num_stages=3)


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    *,
    fmt: KVFormat,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = hot.shape[2:4]
    _check(hot, sealed)
    q = q.contiguous()
    # Rows of no sequence stay 0 and -inf; a decode step of full rows has none.
    out = torch.zeros_like(q)
    lse = torch.full((num_tokens, num_heads), -torch.inf, dtype=torch.float32, device=q.device)
    if num_tokens == 0 or batch.num_seqs == 0:
        return out, lse
    kernels = fmt.tile_kernels()
    data, meta = kernels.views(sealed, q.dtype)
    decode = decode_launch(fmt, head_dim, num_heads // num_kv_heads, page_size)
    tables = (
        batch.query_starts,
        batch.seq_lens,
        batch.rows,
        batch.hot_tables,
        batch.sealed_tables,
        batch.hot_tables.stride(0),
    )
    numbers = (
        scale if softcap is not None else scale * LOG2_E,
        softcap or 0.0,
        sliding_window or 0,
        batch.sink_pages,
        batch.recent_pages,
    )
    flags = {
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": sliding_window is not None,
        "NUM_KV_HEADS": num_kv_heads,
    }
    pages = (hot, data, meta)

    num_splits = _num_splits(q.device, batch.num_seqs * num_kv_heads, batch.max_seq_len, decode)
    parts = torch.empty(
        (num_splits, batch.num_seqs, num_heads, head_dim), dtype=torch.float32, device=q.device
    )
    part_lses = torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device)
    stride_split = batch.num_seqs * num_heads
    attention_kernel[(num_splits, num_kv_heads, batch.num_seqs)](
        q,
        *pages,
        parts,
        part_lses,
        *tables,
        stride_split,
        *numbers,
        num_splits,
        **{**decode.constants, **flags},
        num_warps=decode.num_warps,
        num_stages=decode.num_stages,
    )
    merge_kernel[(batch.num_seqs, num_heads)](
        parts,
        part_lses,
        out,
        lse,
        batch.query_starts,
        num_splits,
        stride_split,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        DECODE=True,
        num_warps=1,
    )
    if batch.max_query_len > 1:
        prefill = prefill_launch(fmt, head_dim, num_heads // num_kv_heads, page_size)
        blocks = triton.cdiv(batch.max_query_len, prefill.constants["BLOCK_Q"])
        attention_kernel[(blocks, num_kv_heads, batch.num_seqs)](
            q,
            *pages,
            out,
            lse,
            *tables,
            0,
            *numbers,
            1,
            **{**prefill.constants, **flags},
            num_warps=prefill.num_warps,
            num_stages=prefill.num_stages,
        )
    return out, lse


def _check(hot: torch.Tensor, sealed: torch.Tensor) -> None:
    page_size, head_dim = hot.shape[3:]
    if page_size % 16:
        raise ValueError(f"hot: the kernels need a page_size that 16 divides, got {page_size}")
    if head_dim % 16:
        raise ValueError(f"hot: the kernels need a head_dim that 16 divides, got {head_dim}")
    if not (hot.is_contiguous() and sealed.is_contiguous()):
        raise ValueError("hot, sealed: the kernels need contiguous arenas")


def _num_splits(device: torch.device, programs: int, max_seq_len: int, launch: Launch) -> int:
    """Enough to fill the device twice, none with less than a few tiles."""
    processors = INTERPRETER_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(2 * processors, programs)
    tiles = triton.cdiv(max_seq_len, launch.constants["BLOCK_N"])
    return max(1, min(wanted, tiles // MIN_TILES_PER_SPLIT, MAX_SPLITS))
