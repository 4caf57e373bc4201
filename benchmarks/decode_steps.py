"""Decode steps of existing sequences: the plans that a scheduler would make for them.

Sequences of a given length are in a pool that is filled with sealed random numbers, so that a
step at a million tokens can be measured without computing a million tokens first. The pages of
a sequence have fixed ids:

    sealed   base + page - sink
    hot      base + page in the sink, and a ring of recent + 1 pages for the others
"""

from __future__ import annotations

import numpy as np
import torch

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.seal import seal_layers
from kvmesh.workers.executor import Allocation
from kvmesh.workers.kv_pool import KVPool
from kvmesh.workers.plan import PENDING, Chunk, RowStart, StepPlan, TableUpdate
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageGeometry, PageNeed

_CONTENT_PAGES = 64


class DecodeSteps:
    """`steps` steps of `batch` sequences, of which the longest end at `context` tokens.

    The sequences' lengths differ by parts of a page, so that they seal at different steps.
    """

    def __init__(self, geometry: PageGeometry, *, batch: int, context: int, steps: int) -> None:
        size = geometry.page_size
        self._geometry = geometry
        self._lengths = [context - steps - i * size // batch for i in range(batch)]
        if self._lengths[-1] < 1:
            raise ValueError(
                f"context: must be larger for {steps} steps to fit, got {context} tokens"
            )
        self._step = 0
        self._sealed_each = len(geometry.sealed_range(context))
        self.allocation = Allocation(
            hot_pages=batch * geometry.hot_per_sequence(),
            sealed_pages=max(1, batch * self._sealed_each),
            max_rows=batch,
            max_pages_per_row=-(-context // size),
        )

    @staticmethod
    def pool_bytes(geometry: PageGeometry, *, batch: int, context: int) -> int:
        """Memory of the allocation."""
        need = PageNeed(geometry.hot_per_sequence(), len(geometry.sealed_range(context)))
        return batch * geometry.bytes_of(need)

    @property
    def kv_bytes(self) -> int:
        """KV bytes that the next step reads: pages of every sequence, once each."""
        return sum(self._geometry.bytes_of(self._geometry.need(n + 1)) for n in self._lengths)

    def plan(self, tokens: list[int] | None) -> StepPlan:
        """The next step; tokens: one per sequence, as chosen by the previous step; None if only the
        ranks know them yet."""
        geometry, size = self._geometry, self._geometry.page_size
        first = self._step == 0
        self._step += 1
        row_starts, chunks = [], []
        hot, sealed, seals = [], [], []
        for row, length in enumerate(self._lengths):
            end = length + 1
            due = geometry.sealed_range(end)
            before = geometry.sealed_range(length)
            page = length // size
            if first:
                row_starts.append(RowStart(row, SamplingParams(temperature=0.0), length, b""))
                kept = {*range(min(geometry.sink_pages, page)), *range(before.stop, page + 1)}
                hot += [(row, p, self._hot_id(row, p)) for p in sorted(kept)]
                sealed += [(row, p, self._sealed_id(row, p)) for p in before]
            elif length % size == 0:
                hot.append((row, page, self._hot_id(row, page)))
            for p in range(before.stop, due.stop):
                sealed.append((row, p, self._sealed_id(row, p)))
                seals.append((self._hot_id(row, p), self._sealed_id(row, p), p))
            token = PENDING if tokens is None else np.int32(tokens[row]).tobytes()
            chunks.append(Chunk(row, length, token, True))
        self._lengths = [length + 1 for length in self._lengths]
        return StepPlan(
            step=self._step,
            row_starts=row_starts,
            chunks=chunks,
            hot=_update(hot),
            sealed=_update(sealed),
            seal_hot=[hot_id for hot_id, _, _ in seals],
            seal_sealed=[sealed_id for _, sealed_id, _ in seals],
            seal_pages=[p for _, _, p in seals],
        )

    def _hot_id(self, row: int, page: int) -> int:
        sink = self._geometry.sink_pages
        ring = self._geometry.recent_pages + 1
        place = page if page < sink else sink + page % ring
        return row * self._geometry.hot_per_sequence() + place

    def _sealed_id(self, row: int, page: int) -> int:
        return row * self._sealed_each + page - self._geometry.sink_pages


def _update(entries: list[tuple[int, int, int]]) -> TableUpdate:
    return TableUpdate(
        [row for row, _, _ in entries],
        [page for _, page, _ in entries],
        [page_id for _, _, page_id in entries],
    )


@torch.inference_mode()
def fill(pool: KVPool, fmt: KVFormat) -> None:
    """Random numbers in every page: a few sealed pages, repeated over the arena."""
    pool.all_hot.normal_()
    layers, total = pool.all_sealed.shape[:2]
    count = min(total, _CONTENT_PAGES)
    content = torch.empty(
        (layers, count, *pool.all_hot.shape[2:]),
        dtype=pool.all_hot.dtype,
        device=pool.all_hot.device,
    ).normal_()
    ids = torch.arange(count, dtype=torch.int32, device=content.device)
    seal_layers(content, pool.all_sealed, ids, ids, fmt=fmt)
    for start in range(count, total, count):
        some = min(count, total - start)
        pool.all_sealed[:, start : start + some] = pool.all_sealed[:, :some]
