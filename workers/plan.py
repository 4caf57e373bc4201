"""What a step does, as data: made by the scheduler, carried out by every rank.

Everything is a delta. A row is a running sequence's place in the ranks' block
tables; what a rank needs to know of a sequence is sent when the row is given
out, page ids when they are taken, tokens when they are computed.
"""

from __future__ import annotations

import msgspec

from kvmesh.workers.sampling_params import SamplingParams


class RowStart(msgspec.Struct, array_like=True, frozen=True):
    """A sequence takes a row.

    prompt_tokens: where its output begins
    history: int32 bytes of the tokens before its first chunk, when penalties count them
    """

    row: int
    params: SamplingParams
    prompt_tokens: int
    history: bytes


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """Tokens [start, start + n) of the sequence in `row`; the last one's successor is
    sampled when `sample` is set. tokens: n int32 as bytes."""

    row: int
    start: int
    tokens: bytes
    sample: bool

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class TableUpdate(msgspec.Struct, array_like=True, frozen=True):
    """table[rows[i], pages[i]] = ids[i]: the logical page's form now lies in page ids[i]."""

    rows: list[int]
    pages: list[int]
    ids: list[int]


class StepPlan(msgspec.Struct, tag="step", frozen=True):
    """One step of the group.

    seal_hot[i], the logical page seal_pages[i] of its sequence, is encoded into
    seal_sealed[i], in every layer, after the chunk's keys and
    values are written and before anything is attended to.
    """

    step: int
    row_starts: list[RowStart]
    chunks: list[Chunk]
    hot: TableUpdate
    sealed: TableUpdate
    seal_hot: list[int]
    seal_sealed: list[int]
    seal_pages: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class SampledToken(msgspec.Struct, array_like=True, frozen=True):
    """logprob and top as in TokenLogprobs; None where they were not asked for."""

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class StepResult(msgspec.Struct, tag="result", frozen=True):
    """tokens: one for each chunk with `sample`, in the plan's order; host_s: time the rank
    spent preparing the step before the model ran."""

    step: int
    tokens: list[SampledToken]
    host_s: float
