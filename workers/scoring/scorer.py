"""Scores sequences the way the engine computes them: scheduler, pages, sealing and attention.

    tokens ──► Scheduler.schedule() ──► StepPlan ──► Rank.score ──► logits of every token
                    ▲                                   │
                    └────────────── commit ◄────────────┘

The only difference from serving is which rows' logits are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch

from kvmesh.workers.executor import Allocation, RankDescription
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.pool_plan import PoolPlan
from kvmesh.workers.request import EngineRequest, TokenIds
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.scheduler import Scheduler
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import PageGeometry

# A chunk has fp32 logits over the whole vocabulary: 50 MB for 50,000 tokens.
CHUNK_TOKENS = 256


class ScoredChunk(NamedTuple):
    """logits: [end - start, vocab_size] fp32; row i predicts the token after position start + i;
    None on ranks without logits"""

    start: int
    end: int
    logits: torch.Tensor | None


class ScoringRank(Protocol):
    """What scoring needs of a rank; workers/rank.py says more."""

    def describe(self) -> RankDescription: ...

    def allocate(self, allocation: Allocation, *, prepare_decode: bool = True) -> None: ...

    def execute(self, plan: StepPlan) -> StepResult | None: ...

    def score(self, plan: StepPlan) -> torch.Tensor | None: ...

    def with_format(self, kv_format: str, calibration: str | None = None) -> Self: ...


class Scorer:
    """Runs one sequence at a time through a rank, with a pool for just that sequence.

    rank: not allocated yet; in a group, every rank has a scorer and makes the same calls
    context: maximum number of tokens of a sequence
    chunk_tokens: computed and returned at a time
    """

    def __init__(
        self, rank: ScoringRank, *, page_size: int, context: int, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        description = rank.describe()
        self._rank = rank
        self._context = context
        self._geometry = PageGeometry(
            page_size=page_size,
            sink_pages=description.sink_pages,
            recent_pages=description.recent_pages,
            hot_page_bytes=description.hot_page_bytes,
            sealed_page_bytes=description.sealed_page_bytes,
            kvp=description.kvp,
        )
        pages = self._geometry.on_fullest(-(-context // page_size))
        pool = PoolPlan(
            hot_pages=self._geometry.hot_per_sequence(),
            # A chunk that begins within a page touches one page more than it fills.
            headroom_pages=self._geometry.on_fullest(-(-chunk_tokens // page_size) + 1),
            sealed_pages=pages,
            max_num_seqs=1,
        )
        rank.allocate(
            Allocation(
                hot_pages=pool.hot_total,
                sealed_pages=pool.sealed_pages,
                max_rows=1,
                max_pages_per_row=pages,
            ),
            prepare_decode=False,  # a text is scored in chunks, none of which decodes
        )
        # Without the prefix cache, so that every window is computed from its beginning.
        self._scheduler = Scheduler(
            self._geometry, pool, max_num_batched_tokens=chunk_tokens, prefix_cache=False
        )

    def logits(self, tokens: TokenIds, first: int = 0) -> Iterator[ScoredChunk]:
        """Logits chunk by chunk, of the chunks that end after position `first`.

        tokens: [n] int32, at most `context`
        """
        assert 0 <= first < len(tokens) <= self._context
        seq = self._add(tokens, SamplingParams(temperature=0.0, max_tokens=1))
        try:
            while seq.to_compute:
                plan = self._scheduler.schedule()
                assert plan is not None
                (chunk,) = plan.chunks
                if chunk.end > first:
                    yield ScoredChunk(chunk.start, chunk.end, self._rank.score(plan))
                else:
                    self._rank.execute(plan)
                self._scheduler.commit(plan)
        finally:
            self._scheduler.remove(seq)

    def generate(self, prompt: TokenIds, max_tokens: int) -> list[int]:
        """Greedy output of `max_tokens` tokens, on the rank that samples; prompt: [n] int32."""
        assert len(prompt) + max_tokens <= self._context
        seq = self._add(prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens))
        while seq.num_output < max_tokens:
            plan = self._scheduler.schedule()
            assert plan is not None
            result = self._rank.execute(plan)
            assert result is not None
            self._scheduler.commit(plan)
            for sampled in result.tokens:
                seq.append(sampled.token_id)
        self._scheduler.remove(seq)
        return [int(token) for token in seq.tokens[len(prompt) :]]

    def _add(self, tokens: TokenIds, params: SamplingParams) -> Sequence:
        request = EngineRequest("scored", np.asarray(tokens, np.int32), params)
        seq = Sequence(request, self._geometry, self._context + params.max_tokens)
        self._scheduler.add(seq)
        return seq
