"""`paged_attention` in Triton; the same signature as the public operator.

Decode runs in parts that `merge_kernel` combines by log-sum-exp (FlashDecoding). The parts
are the splits of the plain loop or, if `takes_integer_path`, the splits of the integer loop
over sealed pages plus one part of the plain loop over hot pages. In both cases the parts of
shared prefixes are added. Prefill is the plain loop. Grids and loop bounds follow from the
host's upper bounds and from lengths read on the device: nothing is read back, so a captured
graph stays correct for other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kvmesh.kernels.attention.batch import AttentionBatch, SharedPrefixes
from kvmesh.kernels.attention.triton_launch import (
    MIN_TILES_PER_SPLIT,
    Launch,
    decode_launch,
    integer_launch,
    one_warp_launch,
    prefill_launch,
    prefix_launch,
    takes_integer_path,
)
from kvmesh.kernels.attention.triton_sealed import HEADS, sealed_kernel
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams
from kvmesh.kernels.formats.tiles_triton import format_kernels
from kvmesh.kernels.gpu import gpu_of
from kvmesh.kernels.merge.triton_merge import merge_decode
from kvmesh.kernels.seal.triton_seal import check_arenas

LOG2_E = 1.4426950408889634
MAX_SPLITS = 256
MAX_PREFIX_SPLITS = 16


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    *,
    fmt: KVFormat,
    scale: float,
    params: LayerParams = NO_PARAMS,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = hot.shape[2:4]
    format_kernels(fmt)
    check_arenas(hot, sealed)
    q = q.contiguous()
    # Rows of no sequence stay 0 and -inf; a decode step with all rows in use has none.
    out = torch.zeros_like(q)
    lse = torch.full((num_tokens, num_heads), -torch.inf, dtype=torch.float32, device=q.device)
    if num_tokens == 0 or batch.num_seqs == 0:
        return out, lse
    found = params.compiled(fmt, page_size)
    # Kernels never read the placeholder passed for a table that a side does not have.
    tables = tuple(lse if table is None else table for table in (found.k_table, found.v_table))
    pages = _Pages(q, hot, sealed.view(torch.int8), tables, batch, scale, softcap, sliding_window)
    group = num_heads // num_kv_heads
    capability = gpu_of(q).capability
    geometry = (found.fmt, head_dim, group, page_size)
    size = q.element_size()
    prefix = prefix_launch(*geometry, size, capability)
    shared_splits = pages.num_prefix_splits(prefix) if pages.prefixes else 0
    integer = takes_integer_path(
        fmt,
        head_dim,
        page_size,
        dtype=q.dtype,
        sliding_window=sliding_window,
        capability=capability,
    )
    sealed_launch = integer_launch(*geometry) if integer else one_warp_launch(*geometry, size)
    if sealed_launch is not None:
        splits = pages.num_splits(sealed_launch)
        parts, part_lses = pages.parts(splits + 1 + shared_splits)
        attend = pages.attend_sealed if integer else pages.attend
        attend(sealed_launch, parts, part_lses, splits)
        hot_launch = decode_launch(*geometry, size, hot_only=True, capability=capability)
        pages.attend(hot_launch, parts[splits:], part_lses[splits:], 1)
        splits += 1
    else:
        plain = decode_launch(*geometry, size, capability=capability)
        splits = pages.num_splits(plain)
        parts, part_lses = pages.parts(splits + shared_splits)
        pages.attend(plain, parts, part_lses, splits)
    if shared_splits:
        part_lses[splits:].fill_(-torch.inf)  # for sequences that share nothing
        pages.attend_prefixes(prefix, parts[splits:], part_lses[splits:], shared_splits)
    merge_decode(parts, part_lses, out, lse, batch.query_starts)
    if batch.max_query_len > 1:
        prefill = prefill_launch(*geometry, size, capability)
        blocks = triton.cdiv(batch.max_query_len, prefill.constants["BLOCK_Q"])
        pages.attend(prefill, out, lse, blocks)
    return out, lse


@dataclass(frozen=True, slots=True)
class _Pages:
    """One layer's arguments, and the launches of its kernels."""

    q: torch.Tensor
    hot: torch.Tensor
    sealed: torch.Tensor
    tables: tuple[torch.Tensor, ...]
    batch: AttentionBatch
    scale: float
    softcap: float | None
    sliding_window: int | None

    def num_splits(self, launch: Launch) -> int:
        """Enough to fill the device, but each split gets at least a few tiles."""
        programs = self._programs(launch) * self.batch.num_seqs
        wanted = launch.programs * self._processors // programs
        tiles = triton.cdiv(self.batch.max_seq_len, launch.tokens)
        return max(1, min(wanted, tiles // MIN_TILES_PER_SPLIT, MAX_SPLITS))  # type: ignore[no-any-return]

    def num_prefix_splits(self, launch: Launch) -> int:
        """Enough for one set to fill the device; more parts would cost more merging."""
        wanted = launch.programs * self._processors // self.hot.shape[2]
        tiles = triton.cdiv(self.batch.max_seq_len, launch.tokens)
        return max(1, min(wanted, tiles // MIN_TILES_PER_SPLIT, MAX_PREFIX_SPLITS))  # type: ignore[no-any-return]

    @property
    def prefixes(self) -> SharedPrefixes | None:
        """The batch's prefixes, or None with a window, which may begin after them."""
        return None if self.sliding_window is not None else self.batch.prefixes

    @property
    def _processors(self) -> int:
        return gpu_of(self.q).processors

    def parts(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse for `count` parts of the keys."""
        shape = (count, self.batch.num_seqs, *self.q.shape[1:])
        parts = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        return parts, torch.empty(shape[:3], dtype=torch.float32, device=self.q.device)

    def attend(
        self, launch: Launch, out: torch.Tensor, lse: torch.Tensor, first_programs: int
    ) -> None:
        """first_programs: splits for decode, blocks of queries for prefill"""
        batch = self.batch
        launch.kernel[(first_programs, self.hot.shape[2], batch.num_seqs)](
            self.q,
            self.hot,
            self.sealed,
            out,
            lse,
            batch.query_starts,
            batch.seq_lens,
            batch.rows,
            batch.hot_tables,
            batch.sealed_tables,
            self._prefix_pages,
            *self.tables,
            batch.hot_tables.stride(0),
            batch.num_seqs * self.q.shape[1],
            self._qk_scale,
            self.softcap or 0.0,
            self.sliding_window or 0,
            batch.sink_pages,
            batch.recent_pages,
            first_programs,
            **{
                **launch.constants,
                "HAS_SOFTCAP": self.softcap is not None,
                "HAS_WINDOW": self.sliding_window is not None,
                "HAS_PREFIXES": launch.constants["DECODE"] and self.prefixes is not None,
                "NUM_KV_HEADS": self.hot.shape[2],
            },
            **launch.options,
        )

    def attend_sealed(
        self, launch: Launch, out: torch.Tensor, lse: torch.Tensor, num_splits: int
    ) -> None:
        batch = self.batch
        launch.kernel[(num_splits, self._programs(launch), batch.num_seqs)](
            self.q,
            self.sealed,
            out,
            lse,
            batch.query_starts,
            batch.seq_lens,
            batch.rows,
            batch.sealed_tables,
            self._prefix_pages,
            *self.tables,
            batch.sealed_tables.stride(0),
            batch.num_seqs * self.q.shape[1],
            self._qk_scale,
            self.softcap or 0.0,
            batch.sink_pages,
            batch.recent_pages,
            num_splits,
            **{
                **launch.constants,
                "HAS_SOFTCAP": self.softcap is not None,
                "HAS_PREFIXES": self.prefixes is not None,
                "NUM_KV_HEADS": self.hot.shape[2],
                "STAGES": launch.options["num_stages"],
            },
            **launch.options,
        )

    def attend_prefixes(
        self, launch: Launch, out: torch.Tensor, lse: torch.Tensor, num_splits: int
    ) -> None:
        batch, prefixes = self.batch, self.prefixes
        assert prefixes is not None
        launch.kernel[(num_splits, self.hot.shape[2], prefixes.starts.shape[0] - 1)](
            self.q,
            self.sealed,
            out,
            lse,
            batch.query_starts,
            batch.rows,
            batch.sealed_tables,
            prefixes.pages,
            prefixes.members,
            prefixes.starts,
            *self.tables,
            batch.sealed_tables.stride(0),
            batch.num_seqs * self.q.shape[1],
            self._qk_scale,
            self.softcap or 0.0,
            batch.sink_pages,
            num_splits,
            **{
                **launch.constants,
                "HAS_SOFTCAP": self.softcap is not None,
                "NUM_KV_HEADS": self.hot.shape[2],
            },
            **launch.options,
        )

    @property
    def _prefix_pages(self) -> torch.Tensor:
        """The table of prefix pages; kernels without HAS_PREFIXES do not read the placeholder."""
        return self.batch.seq_lens if self.prefixes is None else self.prefixes.pages

    def _programs(self, launch: Launch) -> int:
        """Number of programs of one split of one sequence."""
        num_kv_heads = self.hot.shape[2]
        if launch.kernel is sealed_kernel:
            return num_kv_heads * triton.cdiv(self.q.shape[1] // num_kv_heads, HEADS)  # type: ignore[no-any-return]
        return num_kv_heads

    @property
    def _qk_scale(self) -> float:
        return self.scale if self.softcap is not None else self.scale * LOG2_E
