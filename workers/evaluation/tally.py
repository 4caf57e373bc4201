"""Counts of how well a format's next-token distributions do, beside exact KV's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvmesh.workers.evaluation.meter import Meter
from kvmesh.workers.evaluation.scorer import Scorer, lockstep
from kvmesh.workers.request import TokenIds

# Of a chunk's logits so many rows are compared at once: the temporaries stay small.
_ROWS = 64


@dataclass(slots=True)
class Tally:
    """Sums over predictions of next tokens.

    nll_nats: negative log-likelihoods of the tokens that do follow
    kl_nats: KL(exact ‖ format) of the distributions
    hits: predictions whose most likely token does follow
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

    def add(self, logits: torch.Tensor, exact: torch.Tensor, targets: torch.Tensor) -> None:
        """logits, exact: [n, vocab_size] fp32, with the format's KV and with exact KV;
        targets: [n] int64, the tokens that follow"""
        for rows in range(0, len(targets), _ROWS):
            part = slice(rows, rows + _ROWS)
            ours = torch.log_softmax(logits[part], dim=-1)
            theirs = torch.log_softmax(exact[part], dim=-1)
            wanted = targets[part]
            self.predictions += len(wanted)
            self.nll_nats += float(functional.nll_loss(ours, wanted, reduction="sum"))
            self.kl_nats += float(functional.kl_div(ours, theirs, reduction="sum", log_target=True))
            self.hits += int((ours.argmax(dim=-1) == wanted).sum())


def compare(
    scorers: list[Scorer],
    tokens: TokenIds,
    tallies: list[Tally],
    meter: Meter,
    *,
    first: int = 0,
) -> None:
    """Count the predictions from position `first` on into `tallies`, one for each scorer.

    scorers: the first one's distributions are what the others are compared with
    tokens: [n] int32, of which n − 1 − first are predicted
    """
    computed = 0
    for start, parts in lockstep(scorers, tokens, first):
        end = start + len(_given(parts[0]))
        begin, stop = max(start, first), min(end, len(tokens) - 1)
        rows = slice(begin - start, stop - start)
        exact = _given(parts[0])[rows]
        targets = torch.from_numpy(tokens[begin + 1 : stop + 1].astype("int64")).to(exact.device)
        for tally, logits in zip(tallies, parts, strict=True):
            tally.add(_given(logits)[rows], exact, targets)
        meter.advance((end - computed) * len(scorers))
        computed = end


def _given(logits: torch.Tensor | None) -> torch.Tensor:
    assert logits is not None, "only the rank that samples compares"
    return logits
