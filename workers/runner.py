"""Carries out step plans on one rank: tables, model, attention over the pool, sampling."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.attention import AttentionBatch, paged_attention
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.seal import seal_pages
from kvmesh.kernels.write import write_hot
from kvmesh.workers.executor import Allocation
from kvmesh.workers.kv_pool import KVPool
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import ServedModel
from kvmesh.workers.plan import StepPlan, StepResult, TableUpdate
from kvmesh.workers.sampler import Sampler


@dataclass(frozen=True, slots=True)
class _StepTensors:
    """A plan on the device. T tokens, n sampled rows, s pages to seal."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64, hot page id * page_size + offset
    logits_rows: torch.Tensor  # [n] int64, the sampled chunks' last tokens
    seal_hot: torch.Tensor  # [s] int32
    seal_sealed: torch.Tensor  # [s] int32
    batch: AttentionBatch


class ModelRunner:
    """One rank's model, pool and sampler.

    sink_pages, recent_pages: windows read exactly, as every rank of the group has them
    """

    def __init__(
        self,
        model: ServedModel,
        fmt: KVFormat,
        allocation: Allocation,
        *,
        page_size: int,
        sink_pages: int,
        recent_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        samples: bool,
    ) -> None:
        self._model = model
        self._fmt = fmt
        self._page_size = page_size
        self._windows = (sink_pages, recent_pages)
        self._device = device
        self._pool = KVPool(
            allocation,
            fmt,
            num_layers=model.facts.num_layers,
            num_kv_heads=model.num_kv_heads,
            page_size=page_size,
            head_dim=model.head_dim,
            dtype=dtype,
            device=device,
        )
        # The host's copy of the hot tables: slots are computed from it without asking the device.
        self._hot_ids = np.full(self._pool.hot_tables.shape, -1, dtype=np.int64)
        facts = model.facts
        self._sampler = (
            Sampler(facts.vocab_size, facts.eos_token_ids, device) if samples else None
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """Compute the plan; the result on the rank that samples, None on the others."""
        began_s = time.perf_counter()
        self._update(self._pool.hot_tables, plan.hot)
        self._update(self._pool.sealed_tables, plan.sealed)
        self._hot_ids[plan.hot.rows, plan.hot.pages] = plan.hot.ids
        if self._sampler is not None:
            for row_start in plan.row_starts:
                self._sampler.start_row(row_start)
            for chunk in plan.chunks:
                self._sampler.note_tokens(chunk.row, chunk.start, chunk.tokens)
        step = self._tensors(plan)
        host_s = time.perf_counter() - began_s

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttendArgs
        ) -> torch.Tensor:
            return self._attend(step, layer, q, k, v, args)

        logits = self._model.forward(step.input_ids, step.positions, attend, step.logits_rows)
        if self._sampler is None or logits is None:
            return None
        sampled = [chunk for chunk in plan.chunks if chunk.sample]
        tokens = (
            self._sampler.sample(
                logits, [chunk.row for chunk in sampled], [chunk.end for chunk in sampled]
            )
            if sampled
            else []
        )
        return StepResult(plan.step, tokens, host_s)

    def _attend(
        self,
        step: _StepTensors,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        args: AttendArgs,
    ) -> torch.Tensor:
        hot, sealed = self._pool.hot[layer], self._pool.sealed[layer]
        write_hot(k, v, hot, step.slots)
        if step.seal_hot.numel():
            seal_pages(hot, sealed, step.seal_hot, step.seal_sealed, fmt=self._fmt)
        out, _ = paged_attention(
            q,
            hot,
            sealed,
            step.batch,
            fmt=self._fmt,
            scale=args.scale,
            softcap=args.softcap,
            sliding_window=args.sliding_window,
        )
        return out

    def _update(self, table: torch.Tensor, update: TableUpdate) -> None:
        if update.ids:
            at = (self._to_device(update.rows, np.int64), self._to_device(update.pages, np.int64))
            table[at] = self._to_device(update.ids, np.int32)

    def _tensors(self, plan: StepPlan) -> _StepTensors:
        lengths = np.array([chunk.num_tokens for chunk in plan.chunks])
        starts = np.array([chunk.start for chunk in plan.chunks])
        rows = np.array([chunk.row for chunk in plan.chunks])
        ends = starts + lengths
        query_starts = np.concatenate(([0], np.cumsum(lengths)))
        # Position of each packed token: its place in its chunk plus the chunk's start.
        positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], lengths)
        pages = self._hot_ids[np.repeat(rows, lengths), positions // self._page_size]
        tokens = np.frombuffer(b"".join(chunk.tokens for chunk in plan.chunks), dtype=np.int32)
        samples = np.array([chunk.sample for chunk in plan.chunks])
        sink_pages, recent_pages = self._windows
        batch = AttentionBatch(
            query_starts=self._to_device(query_starts, np.int32),
            seq_lens=self._to_device(ends, np.int32),
            rows=self._to_device(rows, np.int32),
            hot_tables=self._pool.hot_tables,
            sealed_tables=self._pool.sealed_tables,
            page_size=self._page_size,
            sink_pages=sink_pages,
            recent_pages=recent_pages,
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
        )
        return _StepTensors(
            input_ids=self._to_device(tokens, np.int64),
            positions=self._to_device(positions, np.int64),
            slots=self._to_device(
                pages * self._page_size + positions % self._page_size, np.int64
            ),
            logits_rows=self._to_device(query_starts[1:][samples] - 1, np.int64),
            seal_hot=self._to_device(plan.seal_hot, np.int32),
            seal_sealed=self._to_device(plan.seal_sealed, np.int32),
            batch=batch,
        )

    def _to_device(
        self, values: npt.ArrayLike, dtype: type[np.int32] | type[np.int64]
    ) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        if self._device.type == "cpu":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)
