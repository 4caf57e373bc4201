"""`paged_attention` in Triton; the same signature as the public operator.

Decode and prefill compute parts of the keys, which are merged by log-sum-exp (FlashDecoding):
`work.py` says which parts, and a kernel's programs go through them. What all layers of a step
have in common is prepared and bound once (`_Step`), so that a layer costs the host its launches:
two in decode, one more where sequences share prefixes, one in prefill, two if its keys are many.
What all queries of a large chunk see is left to `triton_far.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvmesh.kernels.attention.batch import AttentionBatch, GivenDecodeWork
from kvmesh.kernels.attention.dense import dense_attention
from kvmesh.kernels.attention.far import FarWork
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
from kvmesh.kernels.attention.window import Windows
from kvmesh.kernels.attention.work import DecodeWork, Lengths, PrefillWork
from kvmesh.kernels.direct import BoundKernel, Grid
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams
from kvmesh.kernels.gpu import GpuDevice, gpu_of
from kvmesh.kernels.merge.triton_merge import MERGE_OPTIONS, channel_blocks
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
        layers = _StepLayers.of(q, hot, batch, fmt, scale, softcap, sliding_window)
        step = batch.plans[key] = layers.step()
    q = q.contiguous()
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    step.run(q, hot, sealed.view(torch.int8), out, lse)
    return out, lse


@dataclass(frozen=True, slots=True)
class _StepLaunch:
    """A launch that every layer makes.

    outs, lses: results of parts, which layers use one after the other; None if the kernel writes
        the operator's
    merges: it reads these, instead of q and pages
    """

    kernel: BoundKernel
    grid: Grid
    outs: torch.Tensor | None
    lses: torch.Tensor | None
    merges: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """What layers of one kind have in common in a step.

    first_unused: the first row of no sequence, if no kernel clears it
    """

    launches: tuple[_StepLaunch, ...]
    far: FarLaunches | None
    first_unused: int | None

    def run(
        self,
        q: torch.Tensor,
        hot: torch.Tensor,
        sealed: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        if self.first_unused is not None:
            out[self.first_unused :] = 0.0
            lse[self.first_unused :] = -torch.inf
        for launch in self.launches:
            if launch.outs is None or launch.lses is None:
                launch.kernel(launch.grid, q, hot, sealed, out, lse)
            elif launch.merges:
                launch.kernel(launch.grid, launch.outs, launch.lses, out, lse)
            else:
                launch.kernel(launch.grid, q, hot, sealed, launch.outs, launch.lses)
        if self.far is not None:
            self.far.run(q, sealed, out, lse)


@dataclass(frozen=True, slots=True)
class _StepLayers:
    """Layers of one kind in a step, from which their launches follow.

    like: any layer's q; softmax: (factor of q·k, softcap, sliding window), as kernels take it
    """

    like: torch.Tensor
    batch: AttentionBatch
    lengths: Lengths
    windows: Windows
    fmt: KVFormat
    geometry: Geometry
    gpu: GpuDevice
    scale: float
    softmax: tuple[float, float, int]

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
    ) -> _StepLayers:
        return cls(
            q,
            batch,
            Lengths.of(batch),
            Windows.of(batch, sliding_window),
            fmt,
            Geometry.of(hot, q.shape[1], batch.stride),
            gpu_of(q),
            scale,
            (scale if softcap else scale * LOG2_E, softcap or 0.0, sliding_window or 0),
        )

    @property
    def flags(self) -> dict[str, bool]:
        return {"softcap": self.softmax[1] != 0.0, "window": self.softmax[2] != 0}

    @property
    def ends(self) -> tuple[Any, ...]:
        """Arguments of all kernels that read pages."""
        return self.softmax, (self.batch.sink_pages, self.batch.recent_pages)

    def step(self) -> _Step:
        batch, lengths = self.batch, self.lengths
        launches: list[_StepLaunch] = []
        far = None
        # A deterministic batch is attended to by one kernel, whatever its sequences' new tokens.
        chunked = batch.max_query_len > 1 or batch.deterministic
        decodes = not chunked or bool((lengths.counts == 1).any())
        if decodes and not batch.deterministic:
            launches += self._decode()
        if chunked:
            launch = prefill_launch(self.fmt, self.geometry, self.gpu.capability, **self.flags)
            far_work = FarWork.none(lengths)
            if not self.softmax[1] and not batch.deterministic:
                far_work = FarWork.of(
                    lengths,
                    self.windows,
                    num_heads=launch.form.num_heads,
                    group=self.geometry.group,
                    processors=self.gpu.processors,
                )
            if far_work.keys:
                far = self._far(far_work, launch)
                far_work = far_work if far else FarWork.none(lengths)
            launches += self._prefill(launch, far_work)
        used = int(lengths.query_starts[-1])
        cleared = not chunked or used == self.like.shape[0]
        return _Step(tuple(launches), far, None if cleared else used)

    def _decode(self) -> Iterator[_StepLaunch]:
        batch, fmt, geometry, capability = self.batch, self.fmt, self.geometry, self.gpu.capability
        window = self.windows.sliding_window
        prefixes = batch.prefixes if window is None else None
        integer = takes_integer_path(
            fmt,
            geometry.head_dim,
            geometry.page_size,
            dtype=self.like.dtype,
            sliding_window=window,
            capability=capability,
        )
        how = {**self.flags, "integer": integer, "prefixes": prefixes is not None}
        launch = decode_launch(fmt, geometry, capability, **how)
        form = launch.form
        given = batch.decode_work.get(window)
        if given is None:
            work = DecodeWork.of(self.lengths, self.windows)
            starts, set_chunks = map(self._upload, (work.starts, work.set_starts))
            given = GivenDecodeWork(starts, set_chunks, tuple(work.rounds()))
        slots = max((part.end_slot - part.first_slot for part in given.rounds), default=0)
        outs, lses = self._results(max(slots, 1) * form.num_heads)
        pointers = self._pointers(given.starts, given.set_chunks)
        num_seqs = batch.num_seqs
        for part in given.rounds:
            num_slots = part.end_slot - part.first_slot
            where = (pointers, batch.hot_tables.stride(0), part.first_slot, num_slots)
            fixed = (*where, num_seqs, *self.ends, form)
            grid = (max(1, num_slots), form.num_kv_heads * form.head_parts, 1)
            kernel = BoundKernel(launch.kernel, fixed, launch.options)
            yield _StepLaunch(kernel, grid, outs, lses, False)
            if prefixes is not None:
                shared = prefix_launch(fmt, geometry, capability, softcap=how["softcap"])
                fixed = (*where, given.set_chunks.shape[0] - 1, *self.ends, shared.form)
                grid = (shared.fill(self.gpu.processors), form.num_kv_heads, 1)
                kernel = BoundKernel(shared.kernel, fixed, shared.options)
                yield _StepLaunch(kernel, grid, outs, lses, False)
            # The first round also clears rows that belong to no sequence.
            clears = batch.max_query_len == 1 and part.first_seq == 0
            num_rows = self.like.shape[0] if clears else 0
            seqs = (part.first_slot, part.first_seq, part.end_seq, num_seqs)
            grid = (
                max(part.end_seq - part.first_seq, num_rows),
                form.num_heads,
                channel_blocks(form.head_dim),
            )
            fixed = (pointers, *seqs, num_rows, form)
            kernel = BoundKernel(decode_merge_kernel, fixed, MERGE_OPTIONS)
            yield _StepLaunch(kernel, grid, outs, lses, True)

    def _prefill(self, launch: Launch, far: FarWork) -> Iterator[_StepLaunch]:
        form, batch = launch.form, self.batch
        item = form.num_kv_heads * form.block_m
        work = PrefillWork.of(
            self.lengths,
            self.windows,
            form.block_q,
            item * form.head_dim * 4,
            far.chunks,
            min_queries=1 if batch.deterministic else 2,
        )
        starts = self._upload(np.concatenate((work.starts, work.bases)))
        held = max((slab.end - slab.first for slab in work.slabs if not slab.direct), default=0)
        outs, lses = self._results(held * item)
        pointers = self._pointers(starts, starts)
        for slab in work.slabs:
            where = (pointers, batch.hot_tables.stride(0), slab.first, batch.num_seqs)
            fixed = (*where, *self.ends, slab.direct, form)
            grid = (slab.end - slab.first, form.num_kv_heads, 1)
            kernel = BoundKernel(launch.kernel, fixed, launch.options)
            if slab.direct:
                yield _StepLaunch(kernel, grid, None, None, False)
                continue
            yield _StepLaunch(kernel, grid, outs, lses, False)
            where = (pointers, slab.first, slab.first_token, batch.num_seqs)
            num_tokens = slab.end_token - slab.first_token
            grid = (num_tokens, form.num_heads, channel_blocks(form.head_dim))
            kernel = BoundKernel(prefill_merge_kernel, (*where, self.ends[1], form), MERGE_OPTIONS)
            yield _StepLaunch(kernel, grid, outs, lses, True)

    def _far(self, work: FarWork, launch: Launch) -> FarLaunches | None:
        """None if nothing here attends to plain keys of q's dtype and width."""
        form, like = launch.form, self.like
        dense = dense_attention(like.device, like.dtype, form.group, form.head_dim)
        if dense is None:
            return None
        return FarLaunches.of(work.keys, dense, self.batch, form, self.scale, like)

    def _results(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of parts: outs [rows, head_dim] and lses [rows], fp32."""
        outs = torch.empty((rows, self.geometry.head_dim), device=self.like.device)
        return outs, torch.empty(rows, device=self.like.device)

    def _pointers(self, starts: torch.Tensor, set_chunks: torch.Tensor) -> BatchPointers:
        batch, prefixes = self.batch, self.batch.prefixes
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

    def _upload(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        host = torch.from_numpy(values.astype(np.int32))
        device = self.like.device
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
