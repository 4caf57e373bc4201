"""`paged_attention` in Triton; the same signature as the public operator.

Decode and prefill compute parts of the keys, which are merged by log-sum-exp (FlashDecoding):
`work.py` says which parts, and a kernel's programs go through them. What all layers of a step
have in common is prepared once (`_Step`), so that a layer costs the host its launches: two in
decode, one more where sequences share prefixes, one in prefill, two if its keys are many. What
all queries of a large chunk see is left to `triton_far.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvmesh.kernels.attention.batch import AttentionBatch, GivenDecodeWork
from kvmesh.kernels.attention.dense import dense_attention
from kvmesh.kernels.attention.far import FarWork, workspace_numbers
from kvmesh.kernels.attention.triton_decode import decode_merge_kernel
from kvmesh.kernels.attention.triton_far import FarLaunches
from kvmesh.kernels.attention.triton_launch import (
    Geometry,
    Launch,
    decode_launch,
    prefill_launch,
    prefix_launch,
    takes_integer_path,
)
from kvmesh.kernels.attention.triton_parts import BatchPointers
from kvmesh.kernels.attention.triton_prefill import prefill_merge_kernel
from kvmesh.kernels.attention.work import DecodeWork, Lengths, PrefillWork, Round, Slab, Windows
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams
from kvmesh.kernels.gpu import gpu_of
from kvmesh.kernels.merge.triton_merge import channel_blocks
from kvmesh.kernels.seal.triton_seal import check_arenas

LOG2_E = 1.4426950408889634


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
    key = (fmt.name, q.shape, scale, softcap, sliding_window)
    step = batch.plans.get(key)
    if step is None:
        check_arenas(hot, sealed)
        step = batch.plans[key] = _Step.of(q, hot, batch, fmt, scale, softcap, sliding_window)
    q = q.contiguous()
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    step.run(_LayerTensors(q, hot, sealed.view(torch.int8), out, lse))
    return out, lse


@dataclass(frozen=True, slots=True)
class _LayerTensors:
    q: torch.Tensor
    hot: torch.Tensor
    sealed: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, slots=True)
class _DecodeLaunches:
    """num_sets: 0 without shared prefixes; num_rows: of q, if the merge clears unused ones"""

    launch: Launch
    prefix: Launch | None
    batch: BatchPointers
    rounds: tuple[Round, ...]
    prefix_grid: int
    num_seqs: int
    num_sets: int
    num_rows: int
    outs: torch.Tensor
    lses: torch.Tensor


@dataclass(frozen=True, slots=True)
class _PrefillLaunches:
    launch: Launch
    batch: BatchPointers
    slabs: tuple[Slab, ...]
    num_seqs: int
    outs: torch.Tensor | None
    lses: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Step:
    """What layers of one kind have in common in a step.

    first_unused: the first row of no sequence, if the decode part does not clear it
    """

    decode: _DecodeLaunches | None
    prefill: _PrefillLaunches | None
    far: FarLaunches | None
    softmax: tuple[float, float, int]
    windows: tuple[int, int]
    stride_table: int
    first_unused: int | None

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        hot: torch.Tensor,
        batch: AttentionBatch,
        fmt: KVFormat,
        scale: float,
        softcap: float | None,
        sliding_window: int | None,
    ) -> _Step:
        geometry, gpu = Geometry.of(hot, q.shape[1], batch.stride), gpu_of(q)
        lengths = Lengths.of(batch)
        windows = Windows(
            batch.page_size, batch.sink_pages, batch.recent_pages, sliding_window, batch.stride
        )
        flags = {"softcap": softcap is not None, "window": sliding_window is not None}
        decode = prefill = far = None
        # A deterministic batch is attended to by one kernel, whatever its sequences' new tokens.
        chunked = batch.max_query_len > 1 or batch.deterministic
        decodes = not chunked or bool((lengths.counts == 1).any())
        if decodes and not batch.deterministic:
            prefixes = batch.prefixes if sliding_window is None else None
            integer = takes_integer_path(
                fmt,
                geometry.head_dim,
                geometry.page_size,
                dtype=q.dtype,
                sliding_window=sliding_window,
                capability=gpu.capability,
            )
            launch = decode_launch(
                fmt,
                geometry,
                gpu.capability,
                integer=integer,
                prefixes=prefixes is not None,
                **flags,
            )
            work = batch.decode_work.get(sliding_window)
            prefix = None
            if prefixes is not None:
                prefix = prefix_launch(fmt, geometry, gpu.capability, softcap=flags["softcap"])
            decode = _decode(q, batch, lengths, windows, launch, prefix, gpu.processors, work)
        if chunked:
            launch = prefill_launch(fmt, geometry, gpu.capability, **flags)
            far_work = FarWork.none(lengths)
            if softcap is None and not batch.deterministic:
                far_work = FarWork.of(
                    lengths,
                    windows,
                    num_heads=q.shape[1],
                    group=geometry.group,
                    processors=gpu.processors,
                )
            if far_work.keys:
                far = _far(q, batch, far_work, launch, scale)
                far_work = far_work if far else FarWork.none(lengths)
            prefill = _prefill(q, batch, lengths, windows, launch, far_work)
        used = int(lengths.query_starts[-1])
        cleared = not chunked or used == q.shape[0]
        qk_scale = scale if softcap is not None else scale * LOG2_E
        return cls(
            decode,
            prefill,
            far,
            (qk_scale, softcap or 0.0, sliding_window or 0),
            (batch.sink_pages, batch.recent_pages),
            batch.hot_tables.stride(0),
            None if cleared else used,
        )

    def run(self, layer: _LayerTensors) -> None:
        if self.first_unused is not None:
            layer.out[self.first_unused :] = 0.0
            layer.lse[self.first_unused :] = -torch.inf
        if self.decode is not None:
            self._run_decode(self.decode, layer)
        if self.prefill is not None:
            self._run_prefill(self.prefill, layer)
        if self.far is not None:
            self.far.run(layer.q, layer.sealed, layer.out, layer.lse)

    def _run_decode(self, work: _DecodeLaunches, layer: _LayerTensors) -> None:
        form = work.launch.form
        pages = (layer.q, layer.hot, layer.sealed, work.outs, work.lses, work.batch)
        for part in work.rounds:
            num_slots = part.end_slot - part.first_slot
            slots = (self.stride_table, part.first_slot, num_slots)
            work.launch.kernel[(max(1, num_slots), form.num_kv_heads * form.head_parts)](
                *pages,
                *slots,
                work.num_seqs,
                self.softmax,
                self.windows,
                form,
                **work.launch.options,
            )
            if work.prefix is not None:
                work.prefix.kernel[(work.prefix_grid, form.num_kv_heads)](
                    *pages,
                    *slots,
                    work.num_sets,
                    self.softmax,
                    self.windows,
                    work.prefix.form,
                    **work.prefix.options,
                )
            # The first round also clears rows that belong to no sequence.
            num_rows = work.num_rows if part.first_seq == 0 else 0
            num_seqs = part.end_seq - part.first_seq
            grid = (
                max(num_seqs, num_rows),
                form.num_heads,
                channel_blocks(form.head_dim),
            )
            decode_merge_kernel[grid](
                work.outs,
                work.lses,
                layer.out,
                layer.lse,
                work.batch,
                part.first_slot,
                part.first_seq,
                part.end_seq,
                work.num_seqs,
                num_rows,
                form,
                num_warps=4,
            )

    def _run_prefill(self, work: _PrefillLaunches, layer: _LayerTensors) -> None:
        form = work.launch.form
        for slab in work.slabs:
            outs, lses = (layer.out, layer.lse) if slab.direct else (work.outs, work.lses)
            work.launch.kernel[(slab.end - slab.first, form.num_kv_heads)](
                layer.q,
                layer.hot,
                layer.sealed,
                outs,
                lses,
                work.batch,
                self.stride_table,
                slab.first,
                work.num_seqs,
                self.softmax,
                self.windows,
                slab.direct,
                form,
                **work.launch.options,
            )
            if slab.direct:
                continue
            num_tokens = slab.end_token - slab.first_token
            prefill_merge_kernel[(num_tokens, form.num_heads, channel_blocks(form.head_dim))](
                outs,
                lses,
                layer.out,
                layer.lse,
                work.batch,
                slab.first,
                slab.first_token,
                work.num_seqs,
                self.windows,
                form,
                num_warps=4,
            )


def _decode(
    q: torch.Tensor,
    batch: AttentionBatch,
    lengths: Lengths,
    windows: Windows,
    launch: Launch,
    prefix: Launch | None,
    processors: int,
    given: GivenDecodeWork | None,
) -> _DecodeLaunches:
    form, num_seqs = launch.form, batch.num_seqs
    prefix_grid = num_sets = 0
    if given is None:
        work = DecodeWork.of(lengths, windows)
        starts, set_chunks = (_upload(x, q.device) for x in (work.starts, work.set_starts))
        given = GivenDecodeWork(starts, set_chunks, tuple(work.rounds()))
    slots = max((part.end_slot - part.first_slot for part in given.rounds), default=0)
    if prefix is not None:
        num_sets = given.set_chunks.shape[0] - 1
        prefix_grid = prefix.fill(processors)
    outs = torch.empty((max(slots, 1), form.num_heads, form.head_dim), device=q.device)
    return _DecodeLaunches(
        launch,
        prefix,
        _pointers(batch, given.starts, given.set_chunks),
        given.rounds,
        prefix_grid,
        num_seqs,
        num_sets,
        q.shape[0] if batch.max_query_len == 1 else 0,
        outs,
        torch.empty(outs.shape[:2], device=q.device),
    )


def _far(
    q: torch.Tensor, batch: AttentionBatch, work: FarWork, launch: Launch, scale: float
) -> FarLaunches | None:
    """None if nothing here attends to plain keys of q's dtype and width."""
    form = launch.form
    dense = dense_attention(q.device, q.dtype, form.group, form.head_dim)
    if dense is None:
        return None
    size = workspace_numbers(work.keys, batch.page_size, form.num_kv_heads, form.head_dim)
    workspace = torch.empty(size, dtype=q.dtype, device=q.device)
    return FarLaunches(work.keys, dense, batch, form, scale, workspace)


def _prefill(
    q: torch.Tensor,
    batch: AttentionBatch,
    lengths: Lengths,
    windows: Windows,
    launch: Launch,
    far: FarWork,
) -> _PrefillLaunches:
    form = launch.form
    item = form.num_kv_heads * form.block_m
    work = PrefillWork.of(
        lengths,
        windows,
        form.block_q,
        item * form.head_dim * 4,
        far.chunks,
        min_queries=1 if batch.deterministic else 2,
    )
    starts = _upload(np.concatenate((work.starts, work.bases)), q.device)
    held = max((slab.end - slab.first for slab in work.slabs if not slab.direct), default=0)
    outs = lses = None
    if held:
        outs = torch.empty((held * item, form.head_dim), device=q.device)
        lses = torch.empty(held * item, device=q.device)
    pointers = _pointers(batch, starts, starts)
    return _PrefillLaunches(launch, pointers, work.slabs, batch.num_seqs, outs, lses)


def _pointers(
    batch: AttentionBatch, starts: torch.Tensor, set_chunks: torch.Tensor
) -> BatchPointers:
    prefixes = batch.prefixes
    members = (starts,) * 3
    if prefixes is not None:
        members = (prefixes.pages, prefixes.members, prefixes.starts)
    return BatchPointers(
        batch.query_starts,
        batch.seq_lens,
        batch.rows,
        starts if batch.firsts is None else batch.firsts,
        batch.hot_tables,
        batch.sealed_tables,
        starts,
        *members,
        set_chunks,
    )


def _upload(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(values.astype(np.int32))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
