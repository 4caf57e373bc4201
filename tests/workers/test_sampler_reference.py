"""The sampler, compared row by row with plain Python in double precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from hypothesis import given

from kvmesh.workers.plan import RowStart, SampledToken
from kvmesh.workers.sampler import Sampler, uniform
from kvmesh.workers.sampling_params import SamplingParams
from tests.exercised import Exercised
from tests.scenarios import SEEDS, scenarios

EOS = 3
# Probabilities that are so close are in either order in fp32.
MARGIN = 1e-5
SEEN = Exercised(
    "sampler",
    {
        "greedy rows": 100,
        "rows of the whole vocabulary": 80,
        "rows cut by top_k": 80,
        "rows cut by top_p": 80,
        "rows cut by min_p": 80,
        "rows with more tokens than the shortlist": 30,
        "rows whose penalties change the token": 40,
        "rows whose stop tokens are forbidden": 40,
        "rows with logprobs": 300,
        "histories cut in the output": 80,
        "histories cut in the prompt": 80,
    },
)


@dataclass(frozen=True)
class Row:
    """tokens: prompt, then output; cut: how many of them are known when the row starts"""

    params: SamplingParams
    prompt_tokens: int
    tokens: list[int]
    cut: int
    logits: list[float]

    @property
    def position(self) -> int:
        return len(self.tokens) - self.prompt_tokens


def adjusted(row: Row, *, penalties: bool = True) -> list[float]:
    params, logits = row.params, list(row.logits)
    output = row.tokens[row.prompt_tokens :]
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in range(len(logits)):
        if penalties and token in row.tokens:
            factor = params.repetition_penalty
            logits[token] *= factor if logits[token] <= 0 else 1 / factor
        if penalties and token in output:
            logits[token] -= params.presence_penalty
            logits[token] -= params.frequency_penalty * output.count(token)
    if row.position < params.min_tokens:
        for token in {EOS, *params.stop_token_ids}:
            logits[token] = -math.inf
    return logits


def expected_token(row: Row, logits: list[float]) -> int | None:
    """None if fp32 may decide otherwise."""
    params, best = row.params, max(logits)
    if params.greedy:
        SEEN.add("greedy rows")
        return logits.index(best)
    weights = {t: math.exp((x - best) / params.temperature) for t, x in enumerate(logits)}
    draw = uniform(params.seed, row.position)
    if not (params.top_k or params.top_p < 1 or params.min_p):
        SEEN.add("rows of the whole vocabulary")
        return drawn(list(weights.items()), draw)
    order = sorted(weights.items(), key=lambda item: -item[1])
    kept = order[: params.top_k or None]
    SEEN.add("rows cut by top_k", len(kept) < len(order))
    nucleus, total, mass = [], sum(weight for _, weight in kept), 0.0
    for token, weight in kept:
        if abs(mass / total - params.top_p) < MARGIN:
            return None
        if mass < params.top_p * total:
            nucleus.append((token, weight))
        mass += weight
    SEEN.add("rows cut by top_p", len(nucleus) < len(kept))
    if any(abs(weight - params.min_p) < MARGIN for _, weight in nucleus):
        return None
    found = [(token, weight) for token, weight in nucleus if weight >= params.min_p]
    SEEN.add("rows cut by min_p", len(found) < len(nucleus))
    SEEN.add("rows with more tokens than the shortlist", len(found) > 256)
    least = found[-1][1]
    dropped = max((w for _, w in order[len(found) :]), default=0.0)
    if least != dropped and math.isclose(least, dropped, rel_tol=MARGIN):
        return None
    if (chosen := drawn(sorted(found), draw)) is None:
        return None
    as_likely = [x for x in weights.values() if math.isclose(x, weights[chosen], rel_tol=MARGIN)]
    return chosen if len(as_likely) == 1 else None


def drawn(weights: list[tuple[int, float]], draw: float) -> int | None:
    total, mass = sum(weight for _, weight in weights), 0.0
    for token, weight in weights:
        mass += weight
        if abs(mass / total - draw) < MARGIN:
            return None
        if mass > draw * total:
            return token
    return None


def check_logprobs(row: Row, token: SampledToken) -> None:
    """They are the model's, before any parameter."""
    count = row.params.logprobs
    if count is None:
        assert (token.logprob, token.top) == (None, [])
        return
    SEEN.add("rows with logprobs")
    log_sum = math.log(sum(map(math.exp, row.logits)))
    logprobs = [logit - log_sum for logit in row.logits]
    assert token.logprob is not None
    assert abs(token.logprob - logprobs[token.token_id]) < MARGIN
    best = sorted(logprobs, reverse=True)[:count]
    assert len(token.top) == len(best)
    for (token_id, logprob), wanted in zip(token.top, best, strict=True):
        assert abs(logprob - wanted) < MARGIN and abs(logprobs[token_id] - wanted) < MARGIN


def random_row(chance: Random, vocab: int) -> Row:
    prompt, output = chance.randrange(1, 9), chance.randrange(12)
    tokens = [chance.randrange(min(vocab, 14)) for _ in range(prompt + output)]
    params = SamplingParams(
        temperature=chance.choice([0.0, 0.5, 1.0, 3.0]),
        top_k=chance.choice([0, 0, 1, 3, 300, 2000]),
        top_p=chance.choice([1.0, 1.0, 0.3, 0.9, 0.995]),
        min_p=chance.choice([0.0, 0.0, 0.05, 0.4]),
        repetition_penalty=chance.choice([1.0, 1.0, 0.5, 2.0]),
        presence_penalty=chance.choice([0.0, 0.0, 1.0, -1.5]),
        frequency_penalty=chance.choice([0.0, 0.0, 1.0, -0.7]),
        seed=chance.getrandbits(64),
        min_tokens=chance.choice([0, 0, output, output + 1]),
        stop_token_ids=tuple(chance.sample(range(vocab), 2)),
        logprobs=chance.choice([None, None, 0, 1, 3, 20]),
        logit_bias={chance.randrange(vocab): chance.uniform(-5, 5)},
    )
    logits = [chance.gauss(0, chance.choice([0.3, 3.0])) for _ in range(vocab)]
    return Row(params, prompt, tokens, chance.randrange(len(tokens) + 1), logits)


@SEEN.required
@scenarios(250)
@given(seed=SEEDS)
def test_tokens_are_those_of_the_definition(seed: int) -> None:
    """In any batch, with the history in two parts, whatever the rows held before."""
    chance = Random(seed)
    vocab = chance.choice([12, 40, 400, 700])
    sampler = Sampler(vocab, (EOS,), torch.device("cpu"))
    for _ in range(2):
        rows = [random_row(chance, vocab) for _ in range(chance.randrange(1, 7))]
        ids = chance.sample(range(9), len(rows))
        for row_id, row in zip(ids, rows, strict=True):
            tokens = np.array(row.tokens, np.int32)
            history, rest = tokens[: row.cut].tobytes(), tokens[row.cut :].tobytes()
            sampler.start_row(RowStart(row_id, row.params, row.prompt_tokens, history))
            sampler.record_tokens(row_id, row.cut, rest)
            part = "output" if row.cut > row.prompt_tokens else "prompt"
            SEEN.add(f"histories cut in the {part}")
        logits = torch.tensor([row.logits for row in rows])
        sampling = sampler.prepare(ids, [len(row.tokens) for row in rows])
        sampled = sampler.sample(logits, sampling).read()
        for row, token in zip(rows, sampled, strict=True):
            expected = expected_token(row, adjusted(row))
            assert token.fault is None
            check_logprobs(row, token)
            if expected is not None:
                assert token.token_id == expected
                plain = expected_token(row, adjusted(row, penalties=False))
                SEEN.add("rows whose penalties change the token", plain not in (expected, None))
                forbids = row.position < row.params.min_tokens
                SEEN.add("rows whose stop tokens are forbidden", forbids)
