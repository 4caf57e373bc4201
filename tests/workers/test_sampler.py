"""Sampling: distributions, truncation, penalties, and independence of the batch."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from kvmesh.kernels.sample import SampleParams, sample_tokens
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.plan import RowStart, SampledToken, TokenMasks
from kvmesh.workers.sampler import NO_TOKEN, NOT_FINITE, Sampler, uniform
from kvmesh.workers.sampling_params import MIN_TEMPERATURE, SamplingParams
from tests.exercised import Exercised
from tests.scenarios import SEEDS, scenarios

VOCAB = 1000
EOS = 7
CPU = torch.device("cpu")


def sampler_with(*params: SamplingParams, history: list[int] | None = None) -> Sampler:
    """Row i samples with params[i] after a prompt of two tokens and the given output."""
    sampler = Sampler(VOCAB, (EOS,), CPU)
    tokens = np.array([1, 2, *(history or [])], np.int32).tobytes()
    for row, p in enumerate(params):
        sampler.start_row(RowStart(row, p, 2, tokens))
    return sampler


def sample(
    sampler: Sampler,
    logits: torch.Tensor,
    rows: list[int],
    ends: list[int],
    masks: TokenMasks | None = None,
) -> list[SampledToken]:
    return sampler.sample(logits, sampler.prepare(rows, ends), masks).read()


def logits_of(*rows: dict[int, float]) -> torch.Tensor:
    logits = torch.full((len(rows), VOCAB), -10.0)
    for row, values in enumerate(rows):
        for token, value in values.items():
            logits[row, token] = value
    return logits


def drawn(params: SamplingParams, logits: torch.Tensor, n: int) -> list[int]:
    sampler = sampler_with(*[params] * n)
    ends = [2 + i for i in range(n)]  # another position, another draw
    rows = sample(sampler, logits.expand(n, -1).clone(), list(range(n)), ends)
    return [token.token_id for token in rows]


def test_uniform_is_uniform_and_depends_on_both_arguments() -> None:
    draws = np.array([uniform(seed, i) for seed in range(50) for i in range(200)])
    assert draws.min() >= 0 and draws.max() < 1
    histogram, _ = np.histogram(draws, bins=20, range=(0, 1))
    # chi-square with 19 degrees of freedom: 43.8 is exceeded once in a thousand
    assert ((histogram - 500) ** 2 / 500).sum() < 43.8
    assert uniform(1, 2) != uniform(2, 1)


@pytest.mark.parametrize("params", [{}, {"top_k": 3}])
def test_the_smallest_draw_gives_a_token_that_is_possible(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        "kvmesh.workers.sampler.uniforms", lambda seeds, positions: np.zeros(len(seeds))
    )
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[5, 6]] = 1.0
    assert drawn(SamplingParams(temperature=1.0, **params), logits, 1) == [5]


def test_draws_are_those_of_splitmix64() -> None:
    """Its published outputs for the seed 1234567; other versions have to draw the same."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    draws = [uniform(1234567, position) for position in range(3)]
    assert draws == [(number >> 11) / 2**53 for number in published]


@pytest.mark.parametrize("params", [{}, {"top_k": 900}, {"top_p": 0.999999}])
def test_frequencies_follow_the_softmax(params: dict[str, float]) -> None:
    logits = torch.linspace(0, 3, VOCAB)[None]
    n = 4000
    tokens = np.bincount(
        np.array(drawn(SamplingParams(seed=11, **params), logits, n)) // 100,  # type: ignore[arg-type]
        minlength=10,
    )
    wanted = torch.softmax(logits[0].double(), 0).reshape(10, 100).sum(1).numpy() * n
    if "top_k" in params:
        wanted[0] = 0
        wanted *= n / wanted.sum()
        assert tokens[0] == 0
        tokens, wanted = tokens[1:], wanted[1:]
    assert ((tokens - wanted) ** 2 / wanted).sum() < 30


def test_truncations_keep_the_right_tokens() -> None:
    logits = logits_of({10: 4.0, 11: 3.0, 12: 2.0, 13: 1.0})
    assert set(drawn(SamplingParams(top_k=2, seed=1), logits, 300)) == {10, 11}
    assert set(drawn(SamplingParams(top_k=1, seed=1), logits, 50)) == {10}
    # softmax: .64 .24 .09 .03; the nucleus of .7 needs two tokens
    assert set(drawn(SamplingParams(top_p=0.7, seed=1), logits, 300)) == {10, 11}
    assert set(drawn(SamplingParams(min_p=0.1, seed=1), logits, 300)) == {10, 11, 12}
    assert set(drawn(SamplingParams(top_p=1e-9, seed=1), logits, 50)) == {10}


def test_a_temperature_below_the_smallest_takes_the_first_of_the_best() -> None:
    logits = logits_of({10: 4.0, 11: 4.0})
    tiny = SamplingParams(temperature=MIN_TEMPERATURE / 2, seed=1)
    assert set(drawn(tiny, logits, 50)) == {10}
    assert set(drawn(SamplingParams(temperature=MIN_TEMPERATURE, seed=1), logits, 50)) == {10, 11}


def test_a_nucleus_wider_than_the_shortlist_is_exact() -> None:
    logits = torch.zeros(1, VOCAB)
    tokens = drawn(SamplingParams(top_p=0.9, seed=3), logits, 3000)
    assert 850 <= len(set(tokens)) <= 901


def test_top_p_is_relative_to_a_top_k_beyond_the_shortlist() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = float(np.log(10))
    tokens = drawn(SamplingParams(top_k=400, top_p=0.25, seed=3), logits, 3000)
    # A quarter of the weight of 400 tokens, 409: that of token 5, and of 93 others.
    assert 80 <= len(set(tokens)) <= 94


def test_the_result_of_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB) * 3
    kinds = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.8),
        SamplingParams(seed=3, top_k=700, temperature=2.0),
        SamplingParams(temperature=0.0),
    ]
    together = sample(sampler_with(*kinds), logits.clone(), [0, 1, 2, 3], [5, 6, 7, 8])
    for row, params in enumerate(kinds):
        alone = sample(sampler_with(params), logits[row : row + 1].clone(), [0], [5 + row])
        assert alone[0].token_id == together[row].token_id


def test_penalties_and_bias() -> None:
    logits = logits_of({1: 5.0, 20: 4.9, 30: 4.8})
    greedy: dict[str, Any] = {"temperature": 0.0}
    cases = [
        (SamplingParams(**greedy), 1),
        (SamplingParams(repetition_penalty=1.5, **greedy), 20),  # token 1 is in the prompt
        (SamplingParams(presence_penalty=1.0, **greedy), 1),  # no effect on prompt tokens
        (SamplingParams(logit_bias={1: -100, 20: -100}, **greedy), 30),
    ]
    for params, token in cases:
        assert sample(sampler_with(params), logits.clone(), [0], [2])[0].token_id == token
    repeated = sampler_with(SamplingParams(frequency_penalty=0.3, **greedy), history=[1, 1])
    assert sample(repeated, logits.clone(), [0], [4])[0].token_id == 20
    sampler = sampler_with(SamplingParams(presence_penalty=0.5, **greedy))
    sampler.record_tokens(0, 2, np.array([1, 20], np.int32).tobytes())
    assert sample(sampler, logits.clone(), [0], [4])[0].token_id == 30


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}])
@pytest.mark.parametrize(
    "bad",
    [
        [torch.nan],
        [torch.inf],
        [-torch.inf] * VOCAB,
        [1.0, torch.nan, 3.0],
        [1.0, torch.inf],
    ],
)
def test_a_row_without_a_finite_maximum_gets_a_fault_and_its_neighbours_a_token(
    bad: list[float], params: dict[str, float]
) -> None:
    logits = logits_of({10: 4.0}, {}, {10: 4.0})
    logits[1, : len(bad)] = torch.tensor(bad)
    row = SamplingParams(seed=1, logprobs=1, **params)  # type: ignore[arg-type]
    sampler = sampler_with(row, row, row)
    first, faulty, last = sample(sampler, logits.clone(), [0, 1, 2], [2, 3, 4])
    assert faulty == SampledToken(NO_TOKEN, fault=NOT_FINITE)
    for row_id, end, token in ((0, 2, first), (2, 4, last)):
        assert [token] == sample(sampler, logits[:1].clone(), [row_id], [end])
        assert token.fault is None and [token_id for token_id, _ in token.top] == [10]


def test_negative_infinity_excludes_a_token_and_is_no_fault() -> None:
    logits = logits_of({10: 4.0, 11: 3.0})
    logits[0, 10] = -torch.inf
    for params in (SamplingParams(temperature=0.0), SamplingParams(seed=1, top_p=0.5)):
        token = sample(sampler_with(params), logits.clone(), [0], [2])[0]
        assert (token.token_id, token.fault) == (11, None)


def test_stop_tokens_that_are_not_finite_stay_a_fault_before_min_tokens() -> None:
    logits = logits_of({EOS: torch.nan, 10: 4.0})
    params = SamplingParams(temperature=0.0, min_tokens=1)
    assert sample(sampler_with(params), logits, [0], [2])[0].fault == NOT_FINITE


def test_min_tokens_forbids_stopping() -> None:
    logits = logits_of({EOS: 9.0, 50: 8.0, 60: 7.0})
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(50,))
    sampler = sampler_with(params)
    assert [sample(sampler, logits.clone(), [0], [end])[0].token_id for end in (2, 3, 4)] == [
        60,
        60,
        EOS,
    ]


def test_logprobs_are_those_of_the_model() -> None:
    logits = logits_of({3: 2.0, 4: 1.0})
    params = SamplingParams(temperature=0.0, logprobs=2, logit_bias={3: -50.0})
    token = sample(sampler_with(params), logits.clone(), [0], [2])[0]
    reference = torch.log_softmax(logits[0], 0)
    assert token.token_id == 4
    assert token.logprob == pytest.approx(float(reference[4]))
    assert [i for i, _ in token.top] == [3, 4]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("seed", -1),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("stop_token_ids", tuple(range(200))),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_invalid_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


SEEN = Exercised(
    "extreme sampling parameters",
    {"cut rows": 100, "logits of thousands": 30, "tiny temperatures": 60, "tiny nuclei": 40},
)


@SEEN.required
@scenarios(200)
@given(seed=SEEDS)
def test_any_parameters_give_a_token(seed: int) -> None:
    chance = Random(seed)
    temperature = 10.0 ** chance.uniform(-5, 2)
    top_p = 10.0 ** chance.choice([0, chance.uniform(-300, 0)])
    top_k = chance.choice([0, chance.randrange(VOCAB + 6)])
    min_p = chance.choice([0.0, chance.random()])
    scale = 10.0 ** chance.uniform(-3, 6)
    params = SamplingParams(temperature, top_p, top_k, min_p, seed=chance.getrandbits(64))
    SEEN.add("cut rows", top_k > 0 or top_p < 1 or min_p > 0)
    SEEN.add("logits of thousands", scale > 1000)
    SEEN.add("tiny temperatures", temperature < 0.1)
    SEEN.add("tiny nuclei", top_p < 0.01)
    logits = torch.linspace(-scale, scale, VOCAB)[None]
    token = sample(sampler_with(params), logits, [0], [2])[0].token_id
    assert 0 <= token < VOCAB


@pytest.mark.parametrize("unused", [tuple(range(900, VOCAB)), (3, 4, 500, *range(990, VOCAB))])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, logprobs=20),
        SamplingParams(temperature=100.0, logprobs=20),
        SamplingParams(temperature=100.0, top_p=0.99, logprobs=20),
        SamplingParams(temperature=100.0, top_k=990, min_p=0.01, logprobs=20),
        SamplingParams(temperature=5.0, min_tokens=10, repetition_penalty=2.0, logprobs=20),
    ],
)
def test_ids_without_a_token_are_never_sampled_nor_listed(
    unused: tuple[int, ...], params: SamplingParams
) -> None:
    sampler = Sampler(VOCAB, (EOS,), CPU, unused)
    history = np.array([1, 2], np.int32).tobytes()
    for row in range(200):
        sampler.start_row(RowStart(row, params, 2, history))
    logits = torch.zeros(200, VOCAB)
    logits[:, list(unused)] = 5.0
    logits[:100, list(unused)] = torch.nan  # padding may contain anything
    sampled = sample(sampler, logits, list(range(200)), [2 + row for row in range(200)])
    for token in sampled:
        assert token.fault is None
        assert not {token.token_id, *(i for i, _ in token.top)} & set(unused)
        # All used tokens are equally likely.
        assert token.logprob == pytest.approx(-np.log(VOCAB - len(unused)), rel=1e-5)
        assert len(token.top) == 20


def test_ids_without_a_token_have_no_part_in_the_scores_of_a_prompt() -> None:
    unused = (30, 31, *range(990, VOCAB))
    sampler = Sampler(VOCAB, (EOS,), CPU, unused)
    sampler.start_row(RowStart(0, SamplingParams(prompt_logprobs=2), 1, b""))
    logits = logits_of({5: 1.0, 6: 0.5, 30: 5.0, 995: torch.nan}, {7: 1.0, 999: 9.0})
    without = logits.clone()
    without[:, list(unused)] = -torch.inf
    expected = torch.log_softmax(without, -1)
    found = sampler.score(0, logits, torch.tensor([6, 7]))
    assert found.sound
    chosen = np.frombuffer(found.logprobs, np.float32)
    assert chosen.tolist() == pytest.approx([float(expected[0, 6]), float(expected[1, 7])])
    top = np.frombuffer(found.top, np.float32).reshape(2, 2)
    top_ids = np.frombuffer(found.top_ids, np.int32).reshape(2, 2)
    assert (top_ids[0].tolist(), top_ids[1, 0]) == ([5, 6], 7)
    wanted = expected.gather(1, torch.from_numpy(top_ids.astype(np.int64)))
    np.testing.assert_allclose(top, wanted, rtol=1e-6)


def test_scores_of_a_prompt_with_logits_that_are_not_finite_are_not_sound() -> None:
    sampler = sampler_with(SamplingParams(prompt_logprobs=0))
    logits = logits_of({5: 1.0}, {5: torch.nan})
    found = sampler.score(0, logits, torch.tensor([5, 6]))
    assert (found.sound, found.top_ids, found.top) == (False, b"", b"")


def test_no_more_alternatives_are_listed_than_there_are_tokens() -> None:
    sampler = Sampler(VOCAB, (EOS,), CPU, tuple(range(5, VOCAB)))
    sampler.start_row(RowStart(0, SamplingParams(temperature=0.0, logprobs=20), 1, b""))
    (token,) = sample(sampler, torch.randn(1, VOCAB), [0], [1])
    assert sorted(i for i, _ in token.top) == [0, 1, 2, 3, 4]


def test_no_more_alternatives_of_a_prompts_token_are_listed_than_there_are_tokens() -> None:
    sampler = Sampler(VOCAB, (EOS,), CPU, tuple(range(5, VOCAB)))
    sampler.start_row(RowStart(0, SamplingParams(prompt_logprobs=20), 1, b""))
    found = sampler.score(0, torch.randn(1, VOCAB), torch.tensor([3]))
    assert sorted(np.frombuffer(found.top_ids, np.int32).tolist()) == [0, 1, 2, 3, 4]


def masks_of(allowed: dict[int, list[int]]) -> TokenMasks:
    """By position among the sampled rows: the allowed tokens."""
    bits = np.zeros((len(allowed), 32 * -(-VOCAB // 32)), np.uint8)
    for row, tokens in zip(bits, allowed.values(), strict=True):
        row[tokens] = 1
    return TokenMasks(1, list(allowed), np.packbits(bits, axis=1, bitorder="little").tobytes())


def masked(params: SamplingParams, logits: torch.Tensor, allowed: list[int]) -> SampledToken:
    sampler = sampler_with(params)
    (token,) = sample(sampler, logits, [0], [2], masks_of({0: allowed}))
    return token


def test_only_allowed_tokens_are_sampled() -> None:
    greedy, hot = SamplingParams(temperature=0.0), SamplingParams(temperature=100.0)
    sampler = sampler_with(greedy, hot, greedy)
    logits = logits_of({5: 9.0, 999: 1.0}, {5: 50.0}, {5: 9.0, 31: 8.0})
    tokens = sample(sampler, logits, [0, 1, 2], [2] * 3, masks_of({0: [31, 999], 1: [32, 64]}))
    assert tokens[0].token_id == 999
    assert tokens[1].token_id in (32, 64)
    assert tokens[2].token_id == 5, "a row without a mask is free"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, logit_bias={5: 100.0}),
        SamplingParams(top_k=1, logit_bias={5: 100.0}),
        SamplingParams(min_p=1.0, logit_bias={40: -100.0, 41: -100.0}),
        SamplingParams(top_p=1e-9, repetition_penalty=100.0),
    ],
)
def test_a_mask_comes_after_bias_and_penalties(params: SamplingParams) -> None:
    assert masked(params, logits_of({5: 30.0}), [40, 41]).token_id in (40, 41)


def test_min_tokens_and_ignore_eos_forbid_the_end_unless_nothing_else_is_allowed() -> None:
    for params in (
        SamplingParams(temperature=0.0, min_tokens=9),
        SamplingParams(temperature=0.0, ignore_eos=True),
    ):
        assert masked(params, logits_of({EOS: 9.0}), [EOS, 3]).token_id == 3
        assert masked(params, logits_of({3: 9.0}), [EOS]).token_id == EOS
    assert masked(SamplingParams(temperature=0.0), logits_of({EOS: 9.0}), [EOS, 3]).token_id == EOS
    ignoring = sampler_with(SamplingParams(temperature=0.0, ignore_eos=True))
    # Without a mask an end of sequence is a token like any other, which does not end it.
    assert sample(ignoring, logits_of({EOS: 9.0}), [0], [2])[0].token_id == EOS
    for stop in (4, 500, VOCAB - 1):
        params = SamplingParams(temperature=0.0, min_tokens=9, stop_token_ids=(stop,))
        assert masked(params, logits_of({stop: 9.0}), [stop, 3]).token_id == 3
        assert masked(params, logits_of({stop: 9.0}), [stop]).token_id == stop


@pytest.mark.parametrize("end", [64, 70])
def test_an_end_of_sequence_beyond_a_mask_is_not_allowed_by_it(end: int) -> None:
    """A tokenizer can have fewer tokens than the model has logits."""
    sampler = Sampler(VOCAB, (end,), CPU, tuple(range(64, VOCAB)))
    sampler.start_row(RowStart(0, SamplingParams(temperature=0.0, ignore_eos=True), 2, b""))
    bits = np.array([1 << 3, 0, 0, 0, 0, 0, 0, 0], np.uint8).tobytes()
    (token,) = sample(sampler, logits_of({end: 9.0}), [0], [2], TokenMasks(1, [0], bits))
    assert token.token_id == 3


def test_bits_of_a_mask_beyond_the_vocabulary_allow_nothing() -> None:
    """A mask consists of whole words, whose last bits may be anything."""
    sampler = Sampler(12, (EOS,), CPU)
    sampler.start_row(RowStart(0, SamplingParams(temperature=0.0, ignore_eos=True), 2, b""))
    bits = np.array([1 << EOS, 0xF0, 0xFF, 0xFF], np.uint8).tobytes()
    (token,) = sample(sampler, torch.zeros(1, 12), [0], [2], TokenMasks(1, [0], bits))
    assert token.token_id == EOS


def test_logprobs_of_a_masked_row_are_those_before_the_mask() -> None:
    logits = logits_of({5: 2.0, 6: 1.0})
    expected = torch.log_softmax(logits[0], dim=-1)
    token = masked(SamplingParams(temperature=0.0, logprobs=1), logits.clone(), [6])
    assert token.token_id == 6
    assert token.logprob == pytest.approx(float(expected[6]))
    assert token.top[0][0] == 5


def test_a_mask_does_not_hide_nan() -> None:
    token = masked(SamplingParams(), logits_of({5: float("nan")}), [40, 41])
    assert (token.token_id, token.fault) == (NO_TOKEN, NOT_FINITE)


def test_a_sampler_of_a_model_knows_its_vocabulary_and_ends_of_sequence() -> None:
    facts = ModelFacts(
        name="small",
        revision="1",
        architecture="Qwen3ForCausalLM",
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        hidden_size=32,
        mlp_sizes=(),
        vocab_size=10,
        max_model_len=100,
        eos_token_ids=(3, 4),
        weight_bytes=1,
        dtype="float32",
        sliding_windows=(None,),
        unused_token_ids=(9,),
    )
    sampler = Sampler.of(facts, CPU)
    params = SamplingParams(temperature=0.0, min_tokens=1, repetition_penalty=2.0)
    sampler.start_row(RowStart(0, params, 2, b""))
    (token,) = sample(sampler, torch.tensor([[0.0] * 3 + [9, 8, 7, 0, 0, 0, 10]]), [0], [2])
    assert token.token_id == 5, "not an end, nor an id without a token"


def test_what_warms_up_launches_what_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def recorded(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
        launched.append((logits.shape, params.block.shape, params.block.dtype, params.block.device))
        return sample_tokens(logits, params)

    monkeypatch.setattr("kvmesh.workers.sampler.sample_tokens", recorded)
    sampler = sampler_with(SamplingParams(), SamplingParams())
    sampler.warm_up(torch.zeros(2, VOCAB))
    sample(sampler, torch.zeros(2, VOCAB), [0, 1], [2, 2])
    warmed, sampled = launched
    assert warmed == sampled
