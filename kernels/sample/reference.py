"""`sample_tokens` in plain torch: the reference, and the sampler of CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvmesh.kernels.sample.op import SampleParams

# Rows that are cut first consider this many of the most likely tokens; a row that keeps more is
# sorted completely.
SHORTLIST = 256


def sample_tokens(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
    best, tokens = logits.max(dim=-1)
    draws, temperature, top_k, top_p, min_p = params.block.unbind(0)
    # The maximum of a row with NaN is NaN. From finite maxima on, every weight is in [0, 1].
    sound = torch.isfinite(best)
    drawn = (params.host[1] > 0).nonzero()[0]
    if len(drawn):
        rows = torch.from_numpy(drawn).to(logits.device)
        rows = rows[sound[rows]]
        # Weights relative to the most likely token's, which cannot overflow at any temperature.
        weights = torch.exp((logits[rows] - best[rows, None]) / temperature[rows, None].float())
        cut = (top_k[rows] > 0) | (top_p[rows] < 1) | (min_p[rows] > 0)
        whole, some = rows[~cut], rows[cut]
        if len(whole):
            tokens[whole] = _inverse(weights[~cut], draws[whole])
        if len(some):
            limits = (top_k[some], top_p[some], min_p[some])
            tokens[some] = _inverse_cut(weights[cut], draws[some], *limits)
    return tokens.masked_fill_(~sound, -1).to(torch.int32)


def _inverse(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Indices [n] where the cumulative weights [n, m], not normalised, exceed draws of the sum."""
    cumulated = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:].contiguous()
    index = torch.searchsorted(cumulated, total * draws[:, None], right=True)
    # A draw close to 1 can round up to the sum; take the last token with a weight in that case.
    return torch.minimum(index, torch.searchsorted(cumulated, total)).squeeze(-1)


def _inverse_cut(
    weights: torch.Tensor,
    draws: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Like `_inverse`, of the weights that top-k, top-p and min-p keep."""
    vocab = weights.shape[-1]
    top_k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long()[:, None]
    top_p, min_p = top_p[:, None], min_p[:, None].float()
    total = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    size = min(SHORTLIST, vocab)
    while True:
        values, ids = torch.topk(weights, size, dim=-1)
        mass = torch.cumsum(values, dim=-1, dtype=torch.float64)
        last = top_k.clamp(max=size) - 1
        left = torch.where(top_k < vocab, mass.gather(1, last), total)
        # top-p applies after top-k: keep tokens whose preceding cumulative probability is < p.
        nucleus = (mass - values < top_p * left).sum(1, keepdim=True).clamp(min=1) - 1
        last = torch.where(top_p < 1, torch.minimum(last, nucleus), last)
        # Tokens with more than the limit are kept, and so many of those with just that.
        limit = values.gather(1, last)
        ties = last + 1 - (values > limit).sum(1, keepdim=True)
        ties = torch.where(min_p > limit, vocab, ties)
        limit = torch.maximum(limit, min_p)
        unlimited = (top_k >= vocab) & (top_p >= 1)  # except by min-p
        limit = torch.where(unlimited, min_p, limit)
        ties = torch.where(unlimited, vocab, ties)
        # Done if all tokens that may be kept are on the list, and those whose mass was needed.
        unknown = (top_p < 1) & (top_k > size) & (top_k < vocab)
        if size == vocab or not bool((unknown | (values[:, -1:] >= limit)).any()):
            break
        size = vocab
    ids, order = ids.sort(dim=-1)
    values = values.gather(1, order)
    tied = values == limit
    kept = (values > limit) | (tied & (tied.cumsum(1) <= ties))
    chosen = _inverse(torch.where(kept, values, torch.zeros_like(values)), draws)
    return ids.gather(1, chosen[:, None]).squeeze(-1)
