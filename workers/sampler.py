"""Samples next tokens from logits, row by row, independent of the rest of the batch.

The order of operations is the usual one: logit bias, penalties, forbidden tokens; then
temperature, top-k, top-p, min-p on the renormalised distribution; then one uniform draw
by inverse CDF (`kernels/sample`). The uniform number at output position i depends only on
(seed, i).

A mask is applied with the forbidden tokens, whatever bias and penalties have made of a token.
Where a mask allows nothing but an end of sequence, min_tokens and ignore_eos do not count.

A row without a largest finite logit, because the model or an adjustment has made NaN or
infinities, gets no token but a fault, and its neighbours are sampled as without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.kernels.gpu import copied
from kvmesh.kernels.sample import SampleParams, sample_tokens
from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.plan import RowStart, SampledToken, TokenMasks, TokenScores
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.step import ints

NO_TOKEN = -1
NOT_FINITE = "no token could be sampled: no logit is allowed, or some are not finite numbers"


def uniform(seed: int, position: int) -> float:
    """A draw in [0, 1) from two 64-bit integers: SplitMix64's finaliser (Steele et al. 2014)
    applied to the position's Weyl step, 53 bits of the result."""
    return float(uniforms(np.array([seed & _MASK], np.uint64), np.array([position]))[0])


def uniforms(seeds: npt.NDArray[np.uint64], positions: Ints) -> npt.NDArray[np.float64]:
    """`uniform` of each seed and position."""
    steps = (positions + 1).astype(np.uint64)
    z = seeds + steps * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    draws: npt.NDArray[np.float64] = (z >> np.uint64(11)) * 2.0**-53
    return draws


_MASK = (1 << 64) - 1
Ints = npt.NDArray[np.int64]

# What `Sampler` keeps of each row for `prepare`.
_NUMBERS = np.dtype(
    [
        ("seed", np.uint64),
        ("prompt_tokens", np.int64),
        ("temperature", np.float64),
        ("top_k", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("adjusted", np.bool_),
        ("logprobs", np.int64),
    ]
)


@dataclass(slots=True)
class _Row:
    """The state of a row's sampling.

    seen: [vocab] bool, tokens of prompt or output; counts: [vocab] fp32, in the output.
    Both are kept only if a penalty needs them.
    stops: ids of ends of sequence and the row's stop tokens; bias: ids and values of logit_bias;
        both on the device
    """

    params: SamplingParams
    prompt_tokens: int
    stops: torch.Tensor
    seen: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    bias: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a step's rows are sampled, prepared before their logits exist.

    rows, ends: as given; params: on the device
    adjusted: places of rows whose logits change before they are sampled, masks aside
    logprobs: places of rows that want log-probabilities, and how many alternatives
    """

    rows: list[int]
    ends: list[int]
    params: SampleParams
    adjusted: list[int]
    logprobs: dict[int, int]


class SampledRows:
    """The tokens of a step, on their way to the host.

    tokens: [n] int32, on the device; NO_TOKEN for a fault
    """

    def __init__(
        self, tokens: torch.Tensor, columns: torch.Tensor, logprobs: dict[int, int]
    ) -> None:
        """columns: [n + …], what the host reads: the tokens, and for each row of `logprobs` its
        token's log-probability, and those and the ids of the best, as many as any row wants"""
        self.tokens = tokens
        self._logprobs = logprobs
        self._host = columns.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if columns.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[SampledToken]:
        """Waits until they are known, not for what was launched after them."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._host.tolist()
        count = len(self.tokens)
        ids, found = [int(x) for x in values[:count]], values[count:]
        sampled = [_sampled(token_id) for token_id in ids]
        most = max(self._logprobs.values(), default=0)
        for (i, wanted), start in zip(
            self._logprobs.items(), range(0, len(found), 1 + 2 * most), strict=True
        ):
            if ids[i] == NO_TOKEN:
                continue
            best_values = found[start + 1 : start + 1 + wanted]
            best = map(int, found[start + 1 + most : start + 1 + most + wanted])
            pairs = list(zip(best, best_values, strict=True))
            sampled[i] = SampledToken(ids[i], found[start], pairs)
        return sampled


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
        used = {*range(vocab_size)} - {*unused_token_ids}
        self._num_used = len(used)
        # Nearly always the unused ones are the last, which one slice covers.
        last = max(used)
        self._end = last + 1
        holes = sorted({*range(last)} - used)
        self._holes = ints(holes, device) if holes else None
        self._eos = eos_token_ids
        self._device = device
        self._eos_ids = ints(eos_token_ids, device)
        self._rows: dict[int, _Row] = {}
        self._numbers = np.zeros(16, dtype=_NUMBERS)

    @classmethod
    def of(cls, facts: ModelFacts, device: torch.device) -> Sampler:
        return cls(facts.vocab_size, facts.eos_token_ids, device, facts.unused_token_ids)

    def start_row(self, start: RowStart) -> None:
        params = start.params
        stops = self._eos_ids
        if params.stop_token_ids:
            stops = ints(self._eos + params.stop_token_ids, self._device)
        row = _Row(params, start.prompt_tokens, stops)
        if params.repetition_penalty != 1.0:
            row.seen = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            row.counts = torch.zeros(self._vocab_size, device=self._device)
        if params.logit_bias:
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            row.bias = (
                ints(list(params.logit_bias), self._device),
                copied(values, self._device),
            )
        self._rows[start.row] = row
        if start.row >= len(self._numbers):
            more = np.zeros(2 * start.row, dtype=_NUMBERS)
            more[: len(self._numbers)] = self._numbers
            self._numbers = more
        self._numbers[start.row] = (
            params.seed & _MASK,
            start.prompt_tokens,
            0.0 if params.greedy else params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            bool(row.bias or params.min_tokens) or row.seen is not None or row.counts is not None,
            -1 if params.logprobs is None else min(params.logprobs, self._num_used),
        )
        self.record_tokens(start.row, 0, start.history)

    def prepare(self, rows: list[int], ends: list[int]) -> Sampling:
        """What sampling these rows needs on the device, on its way without waiting.

        rows: [n] row ids; ends: [n] current number of tokens of the sequence, prompt and output
        """
        numbers = self._numbers[rows]
        draws = uniforms(numbers["seed"], np.array(ends) - numbers["prompt_tokens"])
        params = SampleParams.of(
            draws,
            numbers["temperature"],
            numbers["top_k"],
            numbers["top_p"],
            numbers["min_p"],
            self._device,
        )
        wanted = np.flatnonzero(numbers["logprobs"] >= 0)
        return Sampling(
            rows,
            ends,
            params,
            np.flatnonzero(numbers["adjusted"]).tolist(),
            dict(zip(wanted.tolist(), numbers["logprobs"][wanted].tolist(), strict=True)),
        )

    def record_tokens(self, row_id: int, start: int, tokens: bytes) -> None:
        """Count the int32 tokens at positions [start, start + n) for the row's penalties."""
        if tokens and self.penalises(row_id):
            ids = ints(np.frombuffer(tokens, dtype=np.int32), self._device)
            self.record(row_id, start, ids)

    def penalises(self, row_id: int) -> bool:
        """Whether the row's tokens are counted."""
        row = self._rows[row_id]
        return row.seen is not None or row.counts is not None

    def record(self, row_id: int, start: int, ids: torch.Tensor) -> None:
        """Like `record_tokens`, for a row that penalises. ids: [n] integers, on the device"""
        row = self._rows[row_id]
        if row.seen is not None:
            row.seen[ids] = True
        if row.counts is not None:
            output = ids[max(0, row.prompt_tokens - start) :]
            row.counts.index_add_(0, output, torch.ones_like(output, dtype=row.counts.dtype))

    def sample(
        self, logits: torch.Tensor, sampling: Sampling, masks: TokenMasks | None = None
    ) -> SampledRows:
        """One token per row, or a fault. Does not wait for the device.

        logits: [n, vocab_size] fp32, changed in place; sampling: from `prepare`
        masks: of those rows that may not sample every token
        """
        self._hide_unused(logits)
        wanted = list(sampling.logprobs)
        raw = None
        if wanted:
            raw = torch.log_softmax(logits[wanted] if len(wanted) < len(logits) else logits, -1)
        allowed = {} if masks is None else self._unpack(masks)
        for i in {*sampling.adjusted, *allowed}:
            row = self._rows[sampling.rows[i]]
            self._adjust(logits[i], row, sampling.ends[i], allowed.get(i))
        tokens = sample_tokens(logits, sampling.params)
        if raw is None:
            return SampledRows(tokens, tokens, {})
        # Everything that the host reads, in one transfer: whole numbers up to 2^53 are exact.
        top, top_ids = torch.topk(raw, max(sampling.logprobs.values()))
        picked = tokens[wanted] if len(wanted) < len(tokens) else tokens
        chosen = raw.gather(1, picked.long().clamp(min=0)[:, None])
        columns = torch.cat((chosen.double(), top.double(), top_ids.double()), 1).flatten()
        return SampledRows(tokens, torch.cat((tokens.double(), columns)), sampling.logprobs)

    def warm_up(self, logits: torch.Tensor) -> None:
        """Compile what `sample` launches. logits: as there"""
        nothing = np.zeros(len(logits))
        params = SampleParams.of(nothing, nothing, nothing, nothing, nothing, self._device)
        sample_tokens(logits, params)

    def score(self, row_id: int, logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        """Log-probabilities of given tokens, and of as many alternatives as the row wants.

        logits: [n, vocab_size] fp32, changed in place; targets: [n] int64
        """
        self._hide_unused(logits)
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
        wanted = self._rows[row_id].params.prompt_logprobs
        assert wanted is not None
        top, ids = torch.topk(logprobs, min(wanted, self._num_used))
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

    def _unpack(self, masks: TokenMasks) -> dict[int, _Mask]:
        """The mask of each masked row."""
        if not masks.positions:  # tokens that were not known when masks were announced need none
            return {}
        host = np.frombuffer(masks.bits, dtype=np.uint8).reshape(len(masks.positions), -1)
        packed = copied(torch.from_numpy(host.copy()), self._device)
        shifts = torch.arange(8, dtype=torch.uint8, device=self._device)
        bits = (packed[:, :, None] >> shifts) & 1
        allowed = bits.flatten(1)[:, : self._vocab_size].to(torch.bool)
        return {position: _Mask(host[i], allowed[i]) for i, position in enumerate(masks.positions)}

    def _adjust(self, logits: torch.Tensor, row: _Row, end: int, mask: _Mask | None) -> None:
        """Apply bias, penalties and forbidden tokens in place. logits: [vocab_size]"""
        params = row.params
        if row.bias is not None:
            logits.index_add_(0, *row.bias)
        if row.seen is not None:
            penalty = params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            torch.where(row.seen, penalised, logits, out=logits)
        if row.counts is not None:
            logits.sub_(row.counts, alpha=params.frequency_penalty)
            logits.sub_((row.counts > 0).to(logits.dtype), alpha=params.presence_penalty)
        if end - row.prompt_tokens < params.min_tokens:
            if mask is None or mask.allows_others(self._eos + params.stop_token_ids):
                _forbid(logits, row.stops)
        elif mask is not None and params.ignore_eos and mask.allows_others(self._eos):
            _forbid(logits, self._eos_ids)
        if mask is not None:
            # Of ids without a token, which masks do not know, nothing is left to forbid.
            known = logits[: len(mask.allowed)]
            known.masked_fill_(~(mask.allowed | known.isnan()), -torch.inf)


@dataclass(frozen=True, slots=True)
class _Mask:
    """bits: [words] uint8 on the host; allowed: [at most vocab_size] bool on the device"""

    bits: npt.NDArray[np.uint8]
    allowed: torch.Tensor

    def allows_others(self, forbidden: tuple[int, ...]) -> bool:
        """Whether it allows more than the forbidden tokens."""
        others = self.bits.copy()
        for token_id in forbidden:
            if token_id < 8 * len(others):
                others[token_id // 8] &= 255 ^ (1 << token_id % 8)
        known = np.unpackbits(others, bitorder="little")[: len(self.allowed)]
        return bool(known.any())


def _forbid(logits: torch.Tensor, ids: torch.Tensor) -> None:
    """In place. logits: [vocab_size]; ids: [n] int64"""
    # Added, not assigned: NaN stays NaN.
    logits.index_add_(0, ids, logits.new_full(ids.shape, -torch.inf))


def _sampled(token_id: int) -> SampledToken:
    if token_id == NO_TOKEN:
        return SampledToken(NO_TOKEN, fault=NOT_FINITE)
    return SampledToken(token_id)
