"""Sequences without a token to sample: they end, and those next to them do not notice."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.executor import MakeMasks
from kvmesh.workers.local import local_executor
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult
from kvmesh.workers.request import EndReason, EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import BLOCK_PAGES
from tests.exercised import Exercised
from tests.model.small import make_small_model
from tests.workers.memory_executor import VOCAB, expected_output
from tests.workers.tainted_executor import BAD, TaintedExecutor
from tests.workers.test_engine import PAGE, make_engine, request, run, tokens_of

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logit_bias={BAD: -100})


def tainted_engine(
    *,
    sink: int = 0,
    recent: int = 0,
    budget: int = 120,
    tokens: int = 64,
    prefix_cache: bool = True,
) -> Engine:
    config = EngineConfig(
        model="memory",
        page_size=PAGE,
        max_num_seqs=4,
        max_num_batched_tokens=tokens,
        prefix_cache=prefix_cache,
    )
    return Engine(config, TaintedExecutor(PAGE, sink, recent, budget))


def test_pages_of_a_sequence_at_fault_are_not_shared() -> None:
    engine = tainted_engine(tokens=16)
    prompt = [int(i) % BAD for i in range(BLOCK_PAGES * PAGE + 5)]
    engine.add(request("bad", [*prompt, BAD], params=PARAMS))
    while not engine.take_page_changes():
        engine.step()  # until its first block is cached
    (delta,) = run(engine)["bad"]
    assert delta.finish_reason is EndReason.FAULT
    assert set(engine.take_page_changes().values()) == {False}
    pool = engine.loads().pool
    assert (pool.hot.cached, pool.sealed.cached) == (0, 0)
    engine.add(request("good", prompt, params=PARAMS))
    last = run(engine)["good"][-1]
    assert last.usage is not None and last.usage.cached_tokens == 0


def test_a_token_that_the_vocabulary_does_not_have_ends_only_its_sequence() -> None:
    engine, executor = make_engine()
    execute = executor.execute

    def wrong(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        result = execute(plan)
        rows = [chunk.row for chunk in plan.chunks if chunk.sample]
        tokens = [
            SampledToken(VOCAB) if row == 0 else token
            for row, token in zip(rows, result.tokens, strict=True)
        ]
        return StepResult(plan.step, tokens, 0.0)

    executor.execute = wrong  # type: ignore[method-assign]
    engine.add(request("a", [3, 4]))
    engine.add(request("b", [5, 6]))
    deltas = run(engine)
    (end,) = deltas["a"]
    assert end.finish_reason is EndReason.FAULT
    assert end.error is not None and str(VOCAB) in end.error
    assert tokens_of(deltas["b"]) == expected_output([5, 6], 10)


# Through the model

NAN, INF = 77, 78
BIAS = {NAN: -100.0, INF: -100.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of two tokens are NaN and infinite."""
    path = make_small_model(
        "LlamaForCausalLM",
        tmp_path_factory.mktemp("faults"),
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        max_position_embeddings=512,
    )
    (file,) = path.glob("*.safetensors")
    weights = load_file(file)
    weights["model.embed_tokens.weight"][NAN, 3] = float("nan")
    weights["model.embed_tokens.weight"][INF] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    return path


def make_model_engine(model: Path, kv_format: str) -> Engine:
    config = EngineConfig(
        model=str(model),
        kv_format=kv_format,
        kv_probe="off",
        page_size=16,
        dtype="float32",
        device="cpu",
        kv_memory_bytes=600 << 10,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        threads_per_rank=1,
    )
    return Engine(config, local_executor(config))


def outputs(engine: Engine, prompts: list[list[int]]) -> list[list[int] | None]:
    """The tokens after each prompt, None for a sequence at fault."""
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, logit_bias=BIAS
    )
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(index), np.array(prompt, np.int32), params))
    deltas = run(engine)
    ends = [deltas[str(index)] for index in range(len(prompts))]
    return [None if end[-1].finish_reason is EndReason.FAULT else tokens_of(end) for end in ends]


@pytest.mark.parametrize(
    "name",
    [
        name if name == "int8" else pytest.param(name, marks=pytest.mark.slow)
        for name in format_names()
        if not get_format(name).needs_calibration
    ],
)
def test_a_model_that_computes_nan_ends_the_sequence_alone(name: str, model: Path) -> None:
    """Also if it has a prefix in common with others, and wherever its pages are used again."""
    numbers = np.random.default_rng(0)
    good = [numbers.integers(3, NAN, length).tolist() for length in (40, 75, 9)]
    alone = make_model_engine(model, name)
    expected = [outputs(alone, [prompt])[0] for prompt in good]
    assert None not in expected
    bad = [[*good[1][:50], token, *good[1][50:]] for token in (NAN, INF)]
    engine = make_model_engine(model, name)
    for _ in range(2):
        found = outputs(engine, [good[0], *bad, good[1], good[2], *bad])
        assert found == [expected[0], None, None, expected[1], expected[2], None, None]


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return make_model_engine(model, "int8")


def doubles() -> st.SearchStrategy[float]:
    """Every bit pattern is as likely as any other, and so are those of small fp32 numbers."""
    any_bits = st.integers(0, 2**64 - 1).map(lambda b: struct.unpack("<d", struct.pack("<Q", b))[0])
    fp32_bits = st.integers(0, 2**32 - 1).map(
        lambda b: struct.unpack("<f", struct.pack("<I", b))[0]
    )
    return st.one_of(any_bits, fp32_bits, st.floats(), st.floats(0, 1), st.floats(-100, 100))


FIELDS: dict[str, st.SearchStrategy[object]] = {
    "temperature": doubles(),
    "top_p": doubles(),
    "min_p": doubles(),
    "repetition_penalty": doubles(),
    "presence_penalty": doubles(),
    "frequency_penalty": doubles(),
    "top_k": st.integers(-1, 2**31),
    "seed": st.integers(-1, 2**64),
    "min_tokens": st.integers(0, 4),
    "logprobs": st.integers(-1, 21),
    "logit_bias": st.dictionaries(st.integers(0, 130), doubles(), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 130), max_size=128).map(tuple),
}
# Few at a time, as most patterns are refused, and the others have to be reached too.
ODD = st.sets(st.sampled_from(sorted(FIELDS)), max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)
GOOD_PROMPT = [5, 9, 30, 8]


SEEN = Exercised("odd numbers", {"refused": 30, "served": 30, "served with odd numbers": 10})


@SEEN.required
@settings(max_examples=150)
@given(odd=ODD, timeout_s=st.none() | doubles())
def test_no_bit_pattern_of_any_number_harms_the_engine_or_a_neighbour(
    engine: Engine, odd: dict[str, object], timeout_s: float | None
) -> None:
    good = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logit_bias=BIAS)
    strange = checked(engine, odd, timeout_s)
    refused = isinstance(strange, InvalidFieldError)
    SEEN.add("refused" if refused else "served")
    SEEN.add("served with odd numbers", not refused and bool(odd))
    if isinstance(strange, InvalidFieldError):
        assert strange.field in {*odd, "timeout_s"}
        return
    engine.add(strange)
    engine.add(EngineRequest("good", np.array(GOOD_PROMPT, np.int32), good))
    deltas = run(engine)
    assert deltas["odd"][-1].finish_reason is not None
    again = EngineRequest("again", np.array(GOOD_PROMPT, np.int32), good)
    engine.add(again)
    assert tokens_of(deltas["good"]) == tokens_of(run(engine)["again"])
    assert len(tokens_of(deltas["good"])) == 5


def checked(
    engine: Engine, odd: dict[str, object], timeout_s: float | None
) -> EngineRequest | InvalidFieldError:
    try:
        params = SamplingParams(max_tokens=4, **odd)  # type: ignore[arg-type]
        request = EngineRequest(
            "odd", np.array([5, 9, 30, 7], np.int32), params, timeout_s=timeout_s
        )
        engine.check(request)
    except InvalidFieldError as error:
        return error
    return request


@pytest.mark.parametrize(
    "odd",
    [
        {"repetition_penalty": 0.01, "logit_bias": {9: 100.0}},
        {"temperature": 1e-5, "top_k": 5},
        {"temperature": 1e-46, "top_k": 5},
        {"top_p": 5e-324},
        {"min_tokens": 4, "stop_token_ids": tuple(range(128))},
    ],
)
def test_extreme_numbers_give_tokens(engine: Engine, odd: dict[str, object]) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True, **odd)  # type: ignore[arg-type]
    engine.add(EngineRequest("odd", np.array(GOOD_PROMPT, np.int32), params))
    assert len(tokens_of(run(engine)["odd"])) == 4
