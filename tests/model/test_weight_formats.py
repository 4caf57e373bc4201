"""Models whose weights are stored in few bits, against transformers with the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kvmesh.kernels.linear import PackedWeight, WeightFormat, pack, unpack
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.load import load_model
from kvmesh.workers.parallel.comm import Communicator
from tests.model.attend import generate_greedily, prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.small import make_small_model

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "weight_format"),
    [("llama", "int8"), ("qwen2", "int4"), ("gemma2", "int8"), ("stablelm", "int8")],
)
def test_rounded_weights_are_what_is_computed_with(
    case: str, weight_format: WeightFormat, tmp_path: Path
) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    theirs = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    head = theirs.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # it is no longer the embeddings
    for module in theirs.modules():
        if isinstance(module, nn.Linear):
            kept = "int8" if module is head else weight_format
            module.weight.data = unpack(pack(module.weight.data, kept))
    ours = load_model(
        path,
        dtype=torch.float32,
        device=CPU,
        comm=Communicator.single(),
        weight_format=weight_format,
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
    with pytest.raises(ConfigError, match="needs a GPU, or float32 on a CPU") as caught:
        load_model(
            path,
            dtype=torch.bfloat16,
            device=CPU,
            comm=Communicator.single(),
            weight_format="int8",
        )
    assert caught.value.field == "weight_format"


def test_weights_that_had_few_bits_before_keep_their_values_in_as_many(tmp_path: Path) -> None:
    """As in a GGUF file: linears in 4 bits with offsets, embeddings that are the head in 8."""
    path = make_small_model("LlamaForCausalLM", tmp_path, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    head = theirs.get_output_embeddings()
    for module in theirs.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = _rounded(module.weight.data, 127 if module is head else 15)
    theirs.save_pretrained(path)
    ours = load_model(path, dtype=torch.float32, device=CPU, comm=Communicator.single())
    modules = [*ours._body.modules(), ours._head]
    weights = [getattr(module, "weight", None) for module in modules]
    embeddings, *linears, head_weight = (w for w in weights if isinstance(w, PackedWeight))
    assert embeddings is head_weight
    assert head_weight.codes.dtype == torch.int8
    assert {weight.codes.dtype for weight in linears} == {torch.uint8}
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPTS[0]])).logits[0]
    logits = prompt_logits(ours, PROMPTS[0])
    assert logits is not None
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5 * max(1.0, expected.std()))


def _rounded(weight: torch.Tensor, steps: int) -> torch.Tensor:
    """As GGUF's Q4_1 and Q8_0 do, for 15 and 127 steps, with scales in fp16."""
    blocks = weight.unflatten(1, (-1, 32))
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    if steps == 127:
        low, high = torch.zeros_like(low), blocks.abs().amax(-1, keepdim=True)
    factor, low = ((high - low) / steps).half().float(), low.half().float()
    codes = ((blocks - low) / factor).round().clamp(-steps if steps == 127 else 0, steps)
    rounded: torch.Tensor = codes * factor + low
    return rounded.flatten(1)
