"""Statistics of a format's next-token distributions, compared with exact KV's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvmesh.workers.request import TokenIds
from kvmesh.workers.scoring.meter import Meter
from kvmesh.workers.scoring.scorer import ScoredChunk, Scorer

# This many rows of a chunk's logits are compared at once, to keep temporaries small.
_ROWS = 64


@dataclass(slots=True)
class Tally:
    """Sums over predictions of next tokens.

    nll_nats: negative log-likelihoods of the tokens that follow
    kl_nats: KL(exact ‖ format) of the distributions
    hits: predictions whose most likely token follows
    """

    predictions: int = 0
    nll_nats: float = 0.0
    kl_nats: float = 0.0
    hits: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll_nats / self.predictions)

    @property
    def mean_kl_nats(self) -> float:
        return self.kl_nats / self.predictions

    @property
    def accuracy(self) -> float:
        return self.hits / self.predictions

    @staticmethod
    def total(parts: Iterable[Tally]) -> Tally:
        total = Tally()
        for part in parts:
            total.predictions += part.predictions
            total.nll_nats += part.nll_nats
            total.kl_nats += part.kl_nats
            total.hits += part.hits
        return total

    def add(self, logits: torch.Tensor, exact: torch.Tensor, targets: torch.Tensor) -> None:
        """logits, exact: [n, vocab_size] fp32, with the format's KV and with exact KV, or the same
        twice, which costs half; targets: [n] int64, the tokens that follow"""
        for rows in range(0, len(targets), _ROWS):
            part = slice(rows, rows + _ROWS)
            ours = torch.log_softmax(logits[part], dim=-1)
            wanted = targets[part]
            self.predictions += len(wanted)
            self.nll_nats += float(functional.nll_loss(ours, wanted, reduction="sum"))
            if logits is not exact:
                theirs = torch.log_softmax(exact[part], dim=-1)
                kl = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
                self.kl_nats += float(kl)
            self.hits += int((ours.argmax(dim=-1) == wanted).sum())


def compare(
    scorers: list[Scorer], tokens: TokenIds, tallies: list[Tally], meter: Meter, *, first: int = 0
) -> None:
    """Add the predictions from position `first` on to `tallies`, one per scorer.

    scorers: made with the same chunk_tokens; the others are compared with the first one's
        distributions. On ranks without logits nothing is counted.
    tokens: [n] int32, of which n − 1 − first are predicted
    """
    exact_chunks, *others = (scorer.logits(tokens, first) for scorer in scorers)
    following = torch.from_numpy(tokens[1:].astype("int64"))
    computed = 0
    # All scorers advance chunk by chunk, so that only two chunks' logits are held at a time.
    for exact in exact_chunks:
        _count(tallies[0], exact, exact, following, first)
        for tally, chunks in zip(tallies[1:], others, strict=True):
            _count(tally, next(chunks), exact, following, first)
        meter.advance((exact.end - computed) * len(scorers))
        computed = exact.end
    for chunks in others:
        assert next(chunks, None) is None, "a format has more chunks than exact"


def _count(
    tally: Tally, chunk: ScoredChunk, exact: ScoredChunk, following: torch.Tensor, first: int
) -> None:
    """following: [n − 1] int64, the token after each position"""
    assert chunk[:2] == exact[:2], "chunks differ between formats"
    if chunk.logits is None or exact.logits is None:
        return
    begin, end = max(chunk.start, first), min(chunk.end, len(following))
    rows = slice(begin - chunk.start, end - chunk.start)
    targets = following[begin:end].to(chunk.logits.device)
    logits = chunk.logits[rows]
    tally.add(logits, logits if chunk is exact else exact.logits[rows], targets)
