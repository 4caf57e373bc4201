"""Every architecture against transformers' own logits and choices, on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import load_model
from kvmesh.workers.parallel.comm import Communicator
from tests.model.attend import generate_greedily, prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.small import first_choices, make_small_model, transformers_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_output_equal_transformers(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    theirs = transformers_model(path)
    ours = load_model(
        path, dtype=torch.float32, device=torch.device("cpu"), comm=Communicator.single()
    )
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPTS[0]])).logits[0]
    logits = prompt_logits(ours, PROMPTS[0])
    assert logits is not None
    assert logits.dtype == torch.float32
    spread = expected.std().item()
    assert spread > 0.05, "the model's logits are too similar to show a difference"
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * max(1.0, spread))

    outputs = generate_greedily(ours, PROMPTS, 16)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert len(output) == 16
        assert output == first_choices(theirs, prompt, output)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_to_fp32_as_in_transformers(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, dtype=torch.bfloat16, **overrides)
    exact = transformers_model(path, dtype=torch.float32)
    theirs = transformers_model(path, dtype=torch.bfloat16)
    ours = load_model(
        path, dtype=torch.bfloat16, device=torch.device("cpu"), comm=Communicator.single()
    )
    prompt = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        truth = exact(prompt).logits[0]
        their_error = _typical(theirs(prompt).logits[0].float() - truth)
    logits = prompt_logits(ours, PROMPTS[0])
    assert logits is not None
    assert _typical(logits - truth) <= 1.5 * their_error


def _typical(errors: torch.Tensor) -> torch.Tensor:
    """Of a token: where rounding chooses another expert, here or there, one differs a lot."""
    return errors.square().mean(-1).sqrt().median()


def test_facts_agree_with_the_checkpoint(tmp_path: Path) -> None:
    path = make_small_model("Gemma2ForCausalLM", tmp_path, head_dim=16, sliding_window=7)
    facts = read_facts(path)
    assert (facts.num_layers, facts.num_heads, facts.num_kv_heads) == (3, 8, 4)
    assert (facts.head_dim, facts.hidden_size, facts.vocab_size) == (16, 64, 131)
    assert facts.sliding_windows == (7, None, 7)
    assert facts.eos_token_ids == (2,)
    assert facts.dtype == "float32"
    parameters = transformers_model(path).num_parameters()
    assert facts.weight_bytes == 4 * parameters
