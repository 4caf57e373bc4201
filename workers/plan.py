"""A step as data: made by the scheduler, executed by every rank.

Everything is a delta. A row is a running sequence's index in the ranks' block tables.
Ranks receive the facts of a sequence when it gets its row, page ids when they are
allocated, and tokens when they are computed.
"""

from __future__ import annotations

import msgspec

from kvmesh.workers.sampling_params import SamplingParams

# In place of a token's int32: the one that the step before has sampled for this row, which the
# leader did not know yet.
PENDING = b"\xff\xff\xff\xff"


class RowStart(msgspec.Struct, array_like=True, frozen=True):
    """A sequence gets a row.

    prompt_tokens: position at which its output begins
    history: int32 bytes of the tokens before its first chunk, if penalties need them
    offset: how its pages are dealt to ranks, see deal.py; page ids in plans name a rank too
    """

    row: int
    params: SamplingParams
    prompt_tokens: int
    history: bytes
    offset: int = 0


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """Tokens [start, start + n) of the sequence in `row`; if `sample` is set, the token after
    the last one is sampled. tokens: n int32 as bytes, or PENDING alone.

    targets: int32 tokens that follow the positions from `score_start` on, whose log-probabilities
        are wanted
    """

    row: int
    start: int
    tokens: bytes
    sample: bool
    targets: bytes = b""
    score_start: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class TableUpdate(msgspec.Struct, array_like=True, frozen=True):
    """table[rows[i], pages[i]] = ids[i]: the logical page is now stored in page ids[i]."""

    rows: list[int]
    pages: list[int]
    ids: list[int]


class StepPlan(msgspec.Struct, tag="step", frozen=True):
    """One step of the group.

    seal_hot[i], the logical page seal_pages[i] of its sequence, is encoded into
    seal_sealed[i] in every layer, after the step's keys and values are written and
    before attention is computed.

    masked: the rank that samples has to wait for the step's TokenMasks
    """

    step: int
    row_starts: list[RowStart]
    chunks: list[Chunk]
    hot: TableUpdate
    sealed: TableUpdate
    seal_hot: list[int]
    seal_sealed: list[int]
    seal_pages: list[int]
    masked: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of given tokens are wanted."""
        return any(chunk.targets for chunk in self.chunks)


class TokenMasks(msgspec.Struct, tag="masks", frozen=True):
    """Which tokens a step may sample, for those of its rows that may not sample every token.

    positions: [m], among the step's chunks with `sample`; bits: [m, ceil(vocab / 32)] int32
    as bytes, in which bit i % 32 of word i // 32 says whether token i is allowed
    """

    step: int
    positions: list[int]
    bits: bytes


class SampledToken(msgspec.Struct, array_like=True, frozen=True):
    """logprob and top as in TokenLogprobs; None if they were not requested.

    fault: why no token could be sampled from the row's logits; its sequence must end
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []
    fault: str | None = None


class TokenScores(msgspec.Struct, array_like=True, frozen=True):
    """Log-probabilities of n given tokens, and of the k best at each of their places.

    Columns as bytes, because there may be a million: logprobs: [n] fp32; top_ids: [n, k] int32;
    top: [n, k] fp32, best first
    sound: whether all logits were finite numbers
    """

    logprobs: bytes
    top_ids: bytes
    top: bytes
    sound: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.logprobs) // 4

    @classmethod
    def joined(cls, parts: list[TokenScores]) -> TokenScores:
        """Those of consecutive tokens, with as many alternatives each."""
        return cls(
            b"".join(part.logprobs for part in parts),
            b"".join(part.top_ids for part in parts),
            b"".join(part.top for part in parts),
            all(part.sound for part in parts),
        )


class StepResult(msgspec.Struct, tag="result", frozen=True):
    """tokens: one per chunk with `sample`, in the plan's order; scores: one per chunk with
    `targets`; host_s: time the rank spent preparing the step before the model ran;
    expert_imbalance: see ExpertLoad, now and then."""

    step: int
    tokens: list[SampledToken]
    host_s: float
    scores: list[TokenScores] = []
    expert_imbalance: float | None = None
