"""`paged_attention` in Triton.

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
from kvmesh.kernels.attention.layer import LayerAttention
from kvmesh.kernels.attention.triton_decode import decode_merge_kernel
from kvmesh.kernels.attention.triton_far import FarLaunches
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_launch import (
    Launch,
    decode_launch,
    prefill_launch,
    prefix_launch,
    prefix_programs,
    takes_integer_path,
)
from kvmesh.kernels.attention.triton_parts import BatchPointers
from kvmesh.kernels.attention.triton_prefill import prefill_merge_kernel
from kvmesh.kernels.attention.window import Windows
from kvmesh.kernels.attention.work import DecodeWork, Lengths, PrefillWork
from kvmesh.kernels.direct import BoundLaunch, BoundLaunches
from kvmesh.kernels.gpu import GpuDevice, copied, gpu_of
from kvmesh.kernels.merge.triton_merge import MERGE_OPTIONS, channel_blocks
from kvmesh.kernels.seal.triton_seal import check_arenas

LOG2_E = 1.4426950408889634


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    layer: LayerAttention,
) -> tuple[torch.Tensor, torch.Tensor]:
    key = (layer.fmt.name, q.shape, layer.scale, layer.softcap, layer.sliding_window)
    step = batch.plans.get(key)
    if step is None:
        check_arenas(hot, sealed)
        layers = _StepLayers.of(q, hot, batch, layer)
        step = batch.plans[key] = layers.step()
    q = q.contiguous()
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    step.run(q, hot, sealed.view(torch.int8), out, lse)
    return out, lse


# What a kernel is given for a layer, of (q, hot, sealed, out, lse): it computes results, computes
# parts of them, or merges parts. Parts are bound to it: layers use them one after the other.
ALL, PAGES, RESULTS = slice(0, 5), slice(0, 3), slice(3, 5)


@dataclass(frozen=True, slots=True)
class _Step:
    """What layers of one kind have in common in a step.

    first_unused: the first row of no sequence, if no kernel clears it
    """

    launches: BoundLaunches
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
        self.launches(q, hot, sealed, out, lse)
        if self.far is not None:
            self.far.run(q, sealed, out, lse)


@dataclass(frozen=True, slots=True)
class _StepLayers:
    """Layers of one kind in a step, from which their launches follow. like: any layer's q"""

    like: torch.Tensor
    batch: AttentionBatch
    layer: LayerAttention
    lengths: Lengths
    windows: Windows
    geometry: Geometry
    gpu: GpuDevice

    @classmethod
    def of(
        cls, q: torch.Tensor, hot: torch.Tensor, batch: AttentionBatch, layer: LayerAttention
    ) -> _StepLayers:
        return cls(
            q,
            batch,
            layer,
            Lengths.of(batch),
            Windows.of(batch, layer.sliding_window),
            Geometry.of(hot, q.shape[1], batch.stride),
            gpu_of(q),
        )

    @property
    def flags(self) -> dict[str, bool]:
        layer = self.layer
        return {"softcap": layer.softcap is not None, "window": layer.sliding_window is not None}

    @property
    def ends(self) -> tuple[Any, ...]:
        """Arguments of all kernels that read pages: (factor of q·k, softcap, sliding window) and
        (sink, recent pages)."""
        layer = self.layer
        factor = layer.scale if layer.softcap else layer.scale * LOG2_E
        softmax = (factor, layer.softcap or 0.0, layer.sliding_window or 0)
        return softmax, (self.batch.sink_pages, self.batch.recent_pages)

    def step(self) -> _Step:
        batch, lengths = self.batch, self.lengths
        launches: list[BoundLaunch] = []
        far = None
        # A deterministic batch is attended to by one kernel, whatever its sequences' new tokens.
        chunked = batch.max_query_len > 1 or batch.deterministic
        decodes = not chunked or bool((lengths.counts == 1).any())
        if decodes and not batch.deterministic:
            launches += self._decode()
        if chunked:
            launch = prefill_launch(
                self.layer.fmt, self.geometry, self.gpu.capability, **self.flags
            )
            far_work = FarWork.none(lengths)
            if self.layer.softcap is None and not batch.deterministic:
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
        return _Step(BoundLaunches(launches), far, None if cleared else used)

    def _decode(self) -> Iterator[BoundLaunch]:
        batch, fmt, geometry = self.batch, self.layer.fmt, self.geometry
        capability = self.gpu.capability
        window = self.windows.sliding_window
        prefixes = batch.prefixes if window is None else None
        integer = takes_integer_path(fmt, geometry, capability, window)
        how = {**self.flags, "integer": integer, "prefixes": prefixes is not None}
        launch = decode_launch(fmt, geometry, capability, **how)
        form = launch.form
        given = batch.decode_work.get(window)
        if given is None:
            work = DecodeWork.of(self.lengths, self.windows)
            starts, set_chunks = map(self._upload, (work.starts, work.set_starts))
            given = GivenDecodeWork(starts, set_chunks, tuple(work.rounds()))
        slots = max((part.end_slot - part.first_slot for part in given.rounds), default=0)
        parts = self._parts(max(slots, 1) * form.num_heads)
        pointers = BatchPointers.of(batch, given.starts, given.set_chunks)
        num_seqs = batch.num_seqs
        for part in given.rounds:
            num_slots = part.end_slot - part.first_slot
            where = (*parts, pointers, batch.hot_tables.stride(0), part.first_slot, num_slots)
            fixed = (*where, num_seqs, *self.ends, form)
            grid = (max(1, num_slots), form.num_kv_heads * form.head_parts, 1)
            yield BoundLaunch(launch.kernel, fixed, launch.options, grid, PAGES)
            if prefixes is not None:
                shared = prefix_launch(fmt, geometry, capability, softcap=how["softcap"])
                fixed = (*where, given.set_chunks.shape[0] - 1, *self.ends, shared.form)
                grid = (prefix_programs(shared, self.gpu.processors), form.num_kv_heads, 1)
                yield BoundLaunch(shared.kernel, fixed, shared.options, grid, PAGES)
            # The first round also clears rows that belong to no sequence.
            clears = batch.max_query_len == 1 and part.first_seq == 0
            num_rows = self.like.shape[0] if clears else 0
            seqs = (part.first_slot, part.first_seq, part.end_seq, num_seqs)
            grid = (
                max(part.end_seq - part.first_seq, num_rows),
                form.num_heads,
                channel_blocks(form.head_dim),
            )
            fixed = (*parts, pointers, *seqs, num_rows, form)
            yield BoundLaunch(decode_merge_kernel, fixed, MERGE_OPTIONS, grid, RESULTS)

    def _prefill(self, launch: Launch, far: FarWork) -> Iterator[BoundLaunch]:
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
        parts = self._parts(held * item)
        pointers = BatchPointers.of(batch, starts, starts)
        for slab in work.slabs:
            into = () if slab.direct else parts
            where = (pointers, batch.hot_tables.stride(0), slab.first, batch.num_seqs)
            fixed = (*into, *where, *self.ends, slab.direct, form)
            grid = (slab.end - slab.first, form.num_kv_heads, 1)
            takes = ALL if slab.direct else PAGES
            yield BoundLaunch(launch.kernel, fixed, launch.options, grid, takes)
            if slab.direct:
                continue
            num_tokens = slab.end_token - slab.first_token
            seqs = (slab.first, slab.first_token, batch.num_seqs)
            fixed = (*parts, pointers, *seqs, self.ends[1], form)
            grid = (num_tokens, form.num_heads, channel_blocks(form.head_dim))
            yield BoundLaunch(prefill_merge_kernel, fixed, MERGE_OPTIONS, grid, RESULTS)

    def _far(self, work: FarWork, launch: Launch) -> FarLaunches | None:
        """None if nothing here attends to plain keys of q's dtype and width."""
        form, like = launch.form, self.like
        dense = dense_attention(like.device, like.dtype, form.group, form.head_dim)
        if dense is None:
            return None
        return FarLaunches.of(work.keys, dense, self.batch, form, self.layer.scale, like)

    def _parts(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Results of parts: outs [rows, head_dim] and lses [rows], fp32."""
        outs = torch.empty((rows, self.geometry.head_dim), device=self.like.device)
        return outs, torch.empty(rows, device=self.like.device)

    def _upload(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return copied(torch.from_numpy(values.astype(np.int32)), self.like.device)
