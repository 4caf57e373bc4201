"""Samples next tokens from logits, row by row, independent of the rest of the batch.

The order of operations is the usual one: logit bias, penalties, forbidden tokens; then
temperature, top-k, top-p, min-p on the renormalised distribution; then one uniform draw
by inverse CDF. The uniform number at output position i depends only on (seed, i).

A mask is applied with the forbidden tokens, whatever bias and penalties have made of a token.
Where a mask allows nothing but an end of sequence, min_tokens and ignore_eos do not count.

A row without a largest finite logit, because the model or an adjustment has made NaN or
infinities, gets no token but a fault, and its neighbours are sampled as without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.plan import RowStart, SampledToken, TokenMasks, TokenScores
from kvmesh.workers.sampling_params import SamplingParams

# Rows with top-k, top-p or min-p first consider this many of the most likely tokens; a row
# whose nucleus is wider is sorted completely.
_SHORTLIST = 256
NO_TOKEN = -1
NOT_FINITE = "no token could be sampled: no logit is allowed, or some are not finite numbers"


def uniform(seed: int, position: int) -> float:
    """A draw in [0, 1) from two 64-bit integers: SplitMix64's finaliser (Steele et al. 2014)
    applied to the position's Weyl step, 53 bits of the result."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


_MASK = (1 << 64) - 1


@dataclass(slots=True)
class _Row:
    """The state of a row's sampling.

    seen: [vocab] bool, tokens of prompt or output; counts: [vocab] fp32, in the output.
    Both are kept only if a penalty needs them.
    """

    params: SamplingParams
    prompt_tokens: int
    seen: torch.Tensor | None = None
    counts: torch.Tensor | None = None


class Sampler:
    """Keeps the sampling state of every row.

    eos_token_ids: forbidden, like the row's stop tokens, before min_tokens are generated
    unused_token_ids: of the vocabulary's padding; they are never sampled, nor listed as
        alternatives, and have no part in any probability
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        unused_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._vocab_size = vocab_size
        unused = set(unused_token_ids)
        self._num_used = vocab_size - len(unused)
        # Nearly always they are the last ones, which one slice covers.
        self._end = next((i + 1 for i in reversed(range(vocab_size)) if i not in unused), 0)
        holes = sorted(token_id for token_id in unused if token_id < self._end)
        self._holes = torch.tensor(holes, dtype=torch.int64, device=device) if holes else None
        self._eos = eos_token_ids
        self._device = device
        self._rows: dict[int, _Row] = {}

    @classmethod
    def of(cls, facts: ModelFacts, device: torch.device) -> Sampler:
        return cls(facts.vocab_size, facts.eos_token_ids, device, facts.unused_token_ids)

    def start_row(self, start: RowStart) -> None:
        params = start.params
        row = _Row(params, start.prompt_tokens)
        if params.repetition_penalty != 1.0:
            row.seen = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            row.counts = torch.zeros(self._vocab_size, device=self._device)
        self._rows[start.row] = row
        self.record_tokens(start.row, 0, start.history)

    def record_tokens(self, row_id: int, start: int, tokens: bytes) -> None:
        """Count the int32 tokens at positions [start, start + n) for the row's penalties."""
        row = self._rows[row_id]
        if (row.seen is None and row.counts is None) or not tokens:
            return
        ids = torch.from_numpy(np.frombuffer(tokens, dtype=np.int32).astype(np.int64))
        ids = ids.to(self._device)
        if row.seen is not None:
            row.seen[ids] = True
        if row.counts is not None:
            output = ids[max(0, row.prompt_tokens - start) :]
            row.counts.index_add_(0, output, torch.ones_like(output, dtype=row.counts.dtype))

    def sample(
        self,
        logits: torch.Tensor,
        rows: list[int],
        ends: list[int],
        masks: TokenMasks | None = None,
    ) -> list[SampledToken]:
        """One token per row, or a fault.

        logits: [n, vocab_size] fp32, changed in place; rows: [n] row ids;
        ends: [n] current number of tokens of the sequence, prompt and output
        masks: of those rows that may not sample every token
        """
        self._hide_unused(logits)
        wanted = [i for i, row in enumerate(rows) if self._rows[row].params.logprobs is not None]
        raw = torch.log_softmax(logits[wanted], dim=-1) if wanted else None
        allowed = {} if masks is None else self._unpack(masks)
        for i, (row_id, end) in enumerate(zip(rows, ends, strict=True)):
            self._adjust(logits[i], self._rows[row_id], end, allowed.get(i))
        # The maximum of a row with NaN is NaN. From finite maxima on, every weight is in [0, 1].
        best, tokens = logits.max(dim=-1)
        sound: list[bool] = torch.isfinite(best).tolist()
        drawn = [i for i, row in enumerate(rows) if sound[i] and not self._rows[row].params.greedy]
        if drawn:
            states = [self._rows[rows[i]] for i in drawn]
            draws = [
                uniform(state.params.seed, ends[i] - state.prompt_tokens)
                for i, state in zip(drawn, states, strict=True)
            ]
            picked = _draw(logits[drawn], [state.params for state in states], draws)
            tokens[drawn] = picked.to(tokens.device)
        ids: list[int] = tokens.tolist()
        sampled = [SampledToken(token_id) for token_id in ids]
        if raw is not None:
            for i, row_logprobs in zip(wanted, raw, strict=True):
                count = min(self._rows[rows[i]].params.logprobs or 0, self._num_used)
                sampled[i] = _with_logprobs(ids[i], row_logprobs, count)
        for i in (i for i, row_is_sound in enumerate(sound) if not row_is_sound):
            sampled[i] = SampledToken(NO_TOKEN, fault=NOT_FINITE)
        return sampled

    def score(self, row_id: int, logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        """Log-probabilities of given tokens, and of as many alternatives as the row wants.

        logits: [n, vocab_size] fp32, changed in place; targets: [n] int64
        """
        self._hide_unused(logits)
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
        count = min(self._rows[row_id].params.prompt_logprobs or 0, self._num_used)
        top, ids = torch.topk(logprobs, count, dim=-1)
        return TokenScores(
            chosen.cpu().numpy().tobytes(),
            ids.to(torch.int32).cpu().numpy().tobytes(),
            top.cpu().numpy().tobytes(),
            bool(torch.isfinite(chosen).all()),
        )

    def _hide_unused(self, logits: torch.Tensor) -> None:
        """In place. logits: [n, vocab_size]"""
        logits[:, self._end :] = -torch.inf
        if self._holes is not None:
            logits.index_fill_(1, self._holes, -torch.inf)

    def _unpack(self, masks: TokenMasks) -> dict[int, torch.Tensor]:
        """For each masked row [vocab_size] bool: which tokens are allowed."""
        packed = torch.frombuffer(bytearray(masks.bits), dtype=torch.uint8).to(self._device)
        shifts = torch.arange(8, dtype=torch.uint8, device=self._device)
        bits = (packed.view(len(masks.positions), -1, 1) >> shifts) & 1
        allowed = bits.flatten(1)[:, : self._vocab_size].to(torch.bool)
        return dict(zip(masks.positions, allowed, strict=True))

    def _adjust(
        self, logits: torch.Tensor, row: _Row, end: int, allowed: torch.Tensor | None
    ) -> None:
        """Apply bias, penalties and forbidden tokens in place.

        logits: [vocab_size]; allowed: [at most vocab_size] bool, None for all
        """
        params = row.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=self._device)
            values = logits.new_tensor(list(params.logit_bias.values()))
            logits.index_add_(0, ids, values)
        if row.seen is not None:
            penalty = params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            torch.where(row.seen, penalised, logits, out=logits)
        if row.counts is not None:
            logits.sub_(row.counts, alpha=params.frequency_penalty)
            logits.sub_((row.counts > 0).to(logits.dtype), alpha=params.presence_penalty)
        forbidden: tuple[int, ...] = ()
        if end - row.prompt_tokens < params.min_tokens:
            forbidden = self._eos + params.stop_token_ids
        elif allowed is not None and params.ignore_eos:
            forbidden = self._eos
        if forbidden and (allowed is None or _allows_others(allowed, forbidden)):
            # Added, not assigned: NaN stays NaN.
            logits[list(forbidden)] -= torch.inf
        if allowed is not None:
            # Of ids without a token, which masks do not know, nothing is left to forbid.
            known = logits[: len(allowed)]
            known.masked_fill_(~(allowed | known.isnan()), -torch.inf)


def _allows_others(allowed: torch.Tensor, forbidden: tuple[int, ...]) -> bool:
    """Whether a mask, [vocab_size] bool, allows more than the forbidden tokens."""
    others = allowed.clone()
    others[list(forbidden)] = False
    return bool(others.any())


def _draw(logits: torch.Tensor, params: list[SamplingParams], draws: list[float]) -> torch.Tensor:
    """Token ids [n] drawn from logits [n, vocab] with the uniform numbers `draws`."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)
    # Weights relative to the most likely token's, which cannot overflow at any temperature.
    best = logits.amax(dim=-1, keepdim=True)
    weights = torch.exp((logits - best) / temperature[:, None])
    at = torch.tensor(draws, dtype=torch.float64, device=device)
    picked = torch.empty(len(params), dtype=torch.int64, device=device)
    cut = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
    whole = [i for i in range(len(params)) if i not in set(cut)]
    if whole:
        picked[whole] = _inverse(weights[whole], at[whole])
    if cut:
        picked[cut] = _inverse_truncated(weights[cut], [params[i] for i in cut], at[cut])
    return picked


def _inverse(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Indices [n] where the cumulative weights [n, m], not normalised, exceed draws of the sum."""
    cumulated = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:].contiguous()
    index = torch.searchsorted(cumulated, total * draws[:, None], right=True)
    # A draw close to 1 can round up to the sum; take the last token with a weight in that case.
    return torch.minimum(index, torch.searchsorted(cumulated, total)).squeeze(-1)


def _inverse_truncated(
    weights: torch.Tensor, params: list[SamplingParams], draws: torch.Tensor
) -> torch.Tensor:
    device, vocab = weights.device, weights.shape[-1]
    top_k = torch.tensor(
        [p.top_k if 0 < p.top_k < vocab else vocab for p in params], device=device
    )[:, None]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    total = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    size = min(_SHORTLIST, vocab)
    while True:
        values, ids = torch.topk(weights, size, dim=-1)
        mass = torch.cumsum(values, dim=-1, dtype=torch.float64)
        # top-p applies after top-k: keep tokens whose preceding cumulative probability is < p.
        left = torch.where(top_k <= size, mass.gather(1, top_k.clamp(max=size) - 1), total)
        keep = (mass - values < top_p * left) & (values >= min_p * values[:, :1])
        keep &= torch.arange(size, device=device) < top_k
        keep[:, 0] = True
        # Done if no row keeps tokens beyond the shortlist, or has a top-k whose mass is not known.
        mass_unknown = (top_p < 1) & (top_k > size) & (top_k < vocab)
        if size == vocab or not bool((mass_unknown | keep[:, -1:] & (top_k > size)).any()):
            break
        size = vocab
    chosen = _inverse(torch.where(keep, values, torch.zeros_like(values)), draws)
    return ids.gather(1, chosen[:, None]).squeeze(-1)


def _with_logprobs(token_id: int, logprobs: torch.Tensor, count: int) -> SampledToken:
    """count: of the best tokens, which are listed"""
    top: list[tuple[int, float]] = []
    if count:
        values, ids = torch.topk(logprobs, count)
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(token_id, float(logprobs[token_id]), top)
