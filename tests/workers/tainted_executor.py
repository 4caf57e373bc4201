"""The memory executor, with a token that computes NaN."""

from __future__ import annotations

import msgspec
import numpy as np

from kvmesh.workers.executor import Allocation, MakeMasks
from kvmesh.workers.plan import Chunk, SampledToken, StepPlan, StepResult
from tests.workers.memory_executor import NEVER_SAMPLED, MemoryExecutor, Page

BAD = NEVER_SAMPLED  # so that only a prompt has it


class TaintedExecutor(MemoryExecutor):
    """The token BAD makes NaN of all pages that are written in its chunk, as attention does,
    and of all that is computed from them."""

    def allocate(self, allocation: Allocation) -> None:
        super().allocate(allocation)
        self._nan_hot: set[int] = set()
        self._nan_sealed: set[int] = set()
        self._nan_rows: set[int] = set()

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        self._nan_rows = set()
        self._nan_sealed -= set(plan.seal_sealed)
        result = super().execute(plan, masks)
        sampled = [chunk.row for chunk in plan.chunks if chunk.sample]
        tokens = [
            SampledToken(-1, fault="NaN") if row in self._nan_rows else token
            for row, token in zip(sampled, result.tokens, strict=True)
        ]
        scored = [chunk.row for chunk in plan.chunks if chunk.targets]
        scores = [
            msgspec.structs.replace(found, sound=row not in self._nan_rows)
            for row, found in zip(scored, result.scores, strict=True)
        ]
        return StepResult(plan.step, tokens, 0.0, scores)

    def _write(self, chunk: Chunk) -> None:
        super()._write(chunk)
        first, last = chunk.start // self._page_size, (chunk.end - 1) // self._page_size
        ids = [int(self._hot_table[chunk.row, page]) for page in range(first, last + 1)]
        if chunk.start % self._page_size == 0:
            self._nan_hot.discard(ids[0])
        self._nan_hot -= set(ids[1:])
        if BAD in np.frombuffer(chunk.tokens, np.int32):
            self._nan_hot |= set(ids)

    def _seal(self, plan: StepPlan) -> None:
        super()._seal(plan)
        for hot, sealed in zip(plan.seal_hot, plan.seal_sealed, strict=True):
            if hot in self._nan_hot:
                self._nan_sealed.add(sealed)

    def _form(self, row: int, page: int, query_page: int) -> Page:
        hot = page < self._sink or page >= query_page - self._recent
        table, nan = (
            (self._hot_table, self._nan_hot) if hot else (self._sealed_table, self._nan_sealed)
        )
        if int(table[row, page]) in nan:
            self._nan_rows.add(row)
        return super()._form(row, page, query_page)
