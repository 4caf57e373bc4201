"""Log-probabilities of a prompt's tokens, against transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.local import local_executor
from kvmesh.workers.request import EndReason, EngineRequest, SequenceDelta
from kvmesh.workers.request_check import check_request
from kvmesh.workers.sampling_params import SamplingParams
from tests.model.small import VOCAB_SIZE, make_small_model

PROMPT = [(7 * i * i + 3) % VOCAB_SIZE for i in range(100)]
K = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model("LlamaForCausalLM", tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def expected(model: Path) -> torch.Tensor:
    """[tokens, vocabulary] log-probabilities."""
    theirs = AutoModelForCausalLM.from_pretrained(model)
    with torch.inference_mode():
        return torch.log_softmax(theirs(torch.tensor([PROMPT])).logits[0], dim=-1)


def make_engine(model: Path, tp: int, chunk: int = 48) -> Engine:
    config = EngineConfig(
        model=str(model),
        kv_format="exact",
        kv_probe="off",
        page_size=16,
        kv_memory_bytes=8 << 20,
        max_num_batched_tokens=chunk,
        tp=tp,
        threads_per_rank=1,
    )
    return Engine(config, local_executor(config))


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = make_engine(model, request.param)
    yield made
    made._pipeline._executor.close()


def run(engine: Engine, params: SamplingParams, **kwargs: int) -> list[SequenceDelta]:
    request = EngineRequest("r", np.array(PROMPT, np.int32), params, **kwargs)  # type: ignore[arg-type]
    check_request(request, engine.info)
    engine.add(request)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    return deltas


def scores_of(deltas: list[SequenceDelta]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = [delta.scores for delta in deltas if delta.scores is not None]
    return (
        np.concatenate([np.frombuffer(x.logprobs, np.float32) for x in found]),
        np.concatenate([np.frombuffer(x.top_ids, np.int32).reshape(-1, K) for x in found]),
        np.concatenate([np.frombuffer(x.top, np.float32).reshape(-1, K) for x in found]),
    )


def test_they_are_those_of_transformers(engine: Engine, expected: torch.Tensor) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=K)
    values, ids = expected[:-1].topk(K, dim=-1)
    chosen = expected[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    for _ in range(2):  # the second time, its pages are cached
        deltas = run(engine, params)
        logprobs, top_ids, top = scores_of(deltas)
        np.testing.assert_allclose(logprobs, chosen.numpy(), atol=2e-4)
        np.testing.assert_allclose(top, values.numpy(), atol=2e-4)
        assert (top_ids == ids.numpy()).mean() > 0.99
        assert sum(delta.scores is not None for delta in deltas) == 3  # chunks
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.cached_tokens == 0
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert tokens[0] == int(expected[-1].argmax())


def test_a_prompt_may_be_scored_without_output(engine: Engine) -> None:
    deltas = run(engine, SamplingParams(max_tokens=0, prompt_logprobs=K))
    assert len(scores_of(deltas)[0]) == len(PROMPT) - 1
    end = deltas[-1]
    assert end.finish_reason is EndReason.LENGTH
    assert end.usage is not None
    assert end.usage.completion_tokens == 0
    assert not any(delta.token_ids for delta in deltas)
    engine.check_integrity()


def test_scoring_continues_where_the_client_has_it(engine: Engine) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=K)
    whole = scores_of(run(engine, params))[0]
    deltas = run(engine, params, scored_tokens=70)
    np.testing.assert_allclose(scores_of(deltas)[0], whole[70:], atol=1e-5)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.cached_tokens == 64  # the pages before
    with pytest.raises(InvalidFieldError, match="scored_tokens"):
        run(engine, params, scored_tokens=len(PROMPT))


def test_no_output_is_wanted_only_with_scores() -> None:
    with pytest.raises(InvalidFieldError, match="max_tokens"):
        SamplingParams(max_tokens=0)
    with pytest.raises(InvalidFieldError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=21)


def test_logits_are_never_there_for_a_whole_chunk(
    model: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.workers.runner.SCORED_ROWS", 7)
    engine = make_engine(model, 1, chunk=100)
    served = engine._pipeline._executor._rank._model  # type: ignore[attr-defined]
    sizes = []
    logits = served.logits

    def watched(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        sizes.append(len(rows))
        found: torch.Tensor | None = logits(hidden, rows)
        return found

    monkeypatch.setattr(served, "logits", watched)
    deltas = run(engine, SamplingParams(max_tokens=0, prompt_logprobs=K))
    chosen = expected[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    np.testing.assert_allclose(scores_of(deltas)[0], chosen.numpy(), atol=2e-4)
    assert max(sizes) == 7
