"""The real embedded model generates the same tokens as transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import load_model
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.parallel.comm import Communicator
from tests.model.attend import generate_greedily
from tests.model.ranks import CPU, compare_models, run_ranks, save_expectation

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "List three uses of a hammer.",
    "Why is the sky blue? Answer in one sentence.",
    "Translate 'good morning' into Spanish.",
]


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
def test_greedy_output_equals_transformers(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    ours = load_model(path, dtype=torch.float32, device=CPU, comm=Communicator.single())
    outputs = generate_greedily(ours, prompts, 64)
    assert tokenizer.decode(outputs[0]).startswith("The capital of France is Paris.")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        generated = theirs.generate(
            torch.tensor([prompt]),
            # Otherwise transformers masks the prompt's <|im_end|>, which is also its padding.
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
        )
        assert output == generated[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_three_ranks_compute_the_same_as_one(path: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode(text) for text in QUESTIONS[:2]]
    expectation = save_expectation(tmp_path / "embedded.pt", path, prompts)
    [(_, _, error, same_tokens)] = run_ranks(compare_models, 3, 1, [expectation])
    assert error < 1e-3
    assert same_tokens
