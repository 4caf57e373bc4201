"""Models whose weights are stored in few bits, against transformers with the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kvmesh.kernels.linear import pack, unpack
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.load import load_model
from kvmesh.workers.parallel.comm import Communicator
from tests.model.attend import generate_greedily, prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.small import make_small_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "stablelm"])
def test_int8_computes_with_the_rounded_weights(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    theirs = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    head = theirs.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # it is no longer the embeddings
    for module in theirs.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = unpack(pack(module.weight.data, "int8"))
    ours = load_model(
        path,
        dtype=torch.float32,
        device=CPU,
        comm=Communicator.single(),
        weight_format="int8",
    )
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPTS[0]])).logits[0]
    logits = prompt_logits(ours, PROMPTS[0])
    assert logits is not None
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5 * max(1.0, expected.std()))


def test_a_sequence_has_the_same_tokens_alone_and_in_a_batch(tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path)
    model = load_model(
        path, dtype=torch.float32, device=CPU, comm=Communicator.single(), weight_format="int8"
    )
    together = generate_greedily(model, PROMPTS, 12)
    assert together == [generate_greedily(model, [prompt], 12)[0] for prompt in PROMPTS]


def test_int8_is_refused_where_there_is_no_loop_for_it(tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path)
    with pytest.raises(ConfigError, match="needs a CPU and float32") as caught:
        load_model(
            path,
            dtype=torch.bfloat16,
            device=CPU,
            comm=Communicator.single(),
            weight_format="int8",
        )
    assert caught.value.field == "weight_format"
