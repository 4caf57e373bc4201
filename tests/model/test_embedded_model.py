"""Facts of the embedded model, and its heads over ranks; tests/workers/test_greedy_output.py has
what it generates.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.model.tokenizer import Tokenizer
from tests.model.ranks import compare_models, run_ranks, save_expectation
from tests.model.shallow import make_shallow, shallow_path

QUESTIONS = ["What is the capital of France?", "Write a haiku about rain."]


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve_model(EMBEDDED_NAME).path


def test_facts(path: Path) -> None:
    facts = read_facts(path)
    assert (facts.name, facts.architecture) == (EMBEDDED_NAME, "LlamaForCausalLM")
    assert (facts.num_layers, facts.num_heads, facts.num_kv_heads) == (30, 9, 3)
    assert (facts.head_dim, facts.hidden_size, facts.vocab_size) == (64, 576, 49152)
    assert (facts.max_model_len, facts.eos_token_ids) == (8192, (2,))


@pytest.mark.slow
def test_three_ranks_compute_the_same_as_one(path: Path, tmp_path: Path) -> None:
    """With a few of its layers, which are all alike."""
    make_shallow()
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode(text) for text in QUESTIONS]
    expectation = save_expectation(tmp_path / "embedded.pt", shallow_path(), prompts)
    [(_, _, error, same_tokens)] = run_ranks(compare_models, 3, 1, [expectation])
    assert error < 1e-3
    assert same_tokens
