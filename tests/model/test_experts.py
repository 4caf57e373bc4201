"""Experts of checkpoints: MXFP4, the layouts they are stored in, and how many tokens each got."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.expert_load import PERIOD_STEPS, ExpertLoad
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import load_model
from kvmesh.workers.model.mxfp4 import decode_mxfp4
from kvmesh.workers.model.sizes import check_tp
from kvmesh.workers.parallel.comm import Communicator
from tests.model.attend import prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.small import change_config, make_small_model, transformers_model

CPU = torch.device("cpu")
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def logits_of(path: Path, comm: Communicator | None = None) -> Tensor:
    comm = comm or Communicator.single()
    model = load_model(path, dtype=torch.float32, device=CPU, comm=comm)
    logits = prompt_logits(model, PROMPTS[0])
    assert logits is not None
    return logits


def random_mxfp4(*shape: int) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(122, 126, blocks.shape[:-1], dtype=torch.uint8)


@pytest.fixture
def mxfp4_model(tmp_path: Path) -> tuple[Path, Path]:
    """A GPT-OSS model with MXFP4 experts, and the same one with those that transformers decodes."""
    torch.manual_seed(0)
    _, overrides = CASES["gpt-oss"]
    plain = make_small_model("GptOssForCausalLM", tmp_path / "plain", **overrides)
    packed = Path(shutil.copytree(plain, tmp_path / "packed"))
    tensors = safetensors.torch.load_file(plain / "model.safetensors")
    decoded = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks, scales = random_mxfp4(experts, outputs, inputs)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert decoded[name].shape == (experts, inputs, outputs)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in decoded.items()},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    safetensors.torch.save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    change_config(packed, quantization_config=MXFP4)
    return packed, plain


def test_mxfp4_is_decoded_as_in_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(2, 4, 2, 16)
    scales = torch.tensor([0, 1, 100, 126, 127, 128, 140, 200], dtype=torch.uint8).repeat(2)
    scales = scales.view(2, 4, 2)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT
    assert torch.equal(decode_mxfp4(blocks, scales, torch.float32), expected)


def test_a_model_with_mxfp4_experts_computes_what_transformers_does(
    mxfp4_model: tuple[Path, Path],
) -> None:
    packed, plain = mxfp4_model
    with torch.inference_mode():
        expected = transformers_model(plain)(torch.tensor([PROMPTS[0]])).logits[0]
    torch.testing.assert_close(logits_of(packed), expected, rtol=0, atol=5e-5)
    assert torch.equal(logits_of(packed), logits_of(plain))
    assert read_facts(packed).dtype == "float32"


class OneOfTwo(Communicator):
    """Loads a part; does not compute."""

    size = 2


def test_blocks_of_mxfp4_are_not_split(mxfp4_model: tuple[Path, Path]) -> None:
    packed, _ = mxfp4_model
    with pytest.raises(ConfigError, match="expert_parallel") as caught:
        load_model(packed, dtype=torch.float32, device=CPU, comm=OneOfTwo())
    assert caught.value.field == "tp"
    load_model(packed, dtype=torch.float32, device=CPU, comm=OneOfTwo(), expert_parallel=True)


@pytest.mark.parametrize("case", ["qwen3-moe", "mixtral", "olmoe"])
def test_joined_experts_are_read_like_separate_ones(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    expected = logits_of(path)
    file = path / "model.safetensors"
    state = transformers_model(path).state_dict()
    joined = {name: tensor.contiguous() for name, tensor in state.items()}
    assert any(name.endswith("experts.gate_up_proj") for name in joined)
    safetensors.torch.save_file(joined, file, {"format": "pt"})
    assert torch.equal(logits_of(path), expected)


@pytest.mark.parametrize("lost", ["experts.2.w3.weight", "gate.weight"])
def test_a_missing_expert_is_named(lost: str, tmp_path: Path) -> None:
    architecture, overrides = CASES["mixtral"]
    path = make_small_model(architecture, tmp_path, **overrides)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    name = f"model.layers.1.block_sparse_moe.{lost}"
    del tensors[name]
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=name):
        logits_of(path)


def test_experts_of_more_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    architecture, overrides = CASES["mixtral"]
    path = make_small_model(architecture, tmp_path, **overrides)
    change_config(path, num_local_experts=3)
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"gate|experts\.3"):
        logits_of(path)


def test_an_activation_that_experts_do_not_have_is_refused(tmp_path: Path) -> None:
    architecture, overrides = CASES["mixtral"]
    path = make_small_model(architecture, tmp_path, **overrides)
    change_config(path, hidden_act="gelu")
    with pytest.raises(UnsupportedModelError, match="gelu"):
        logits_of(path)


def test_tp_divides_experts_or_their_width(tmp_path: Path) -> None:
    architecture, overrides = CASES["olmoe"]
    overrides = {**overrides, "num_key_value_heads": 8, "intermediate_size": 92}
    facts = read_facts(make_small_model(architecture, tmp_path, **overrides))
    assert (facts.num_experts, facts.expert_size) == (6, 92)
    for tp, by_expert in ((1, False), (2, False), (4, False), (2, True)):
        check_tp(facts, tp, expert_parallel=by_expert)
    with pytest.raises(ConfigError, match=r"MLP of 92\): 1, 2, 4; got 8"):
        check_tp(facts, 8)
    with pytest.raises(ConfigError, match=r"6 experts\): 1, 2; got 4"):
        check_tp(facts, 4, expert_parallel=True)


def test_tokens_of_experts_are_counted_over_steps(tmp_path: Path) -> None:
    architecture, overrides = CASES["qwen3-moe"]  # its layer 1 has no experts
    path = make_small_model(architecture, tmp_path, **overrides)
    model = load_model(path, dtype=torch.float32, device=CPU, comm=Communicator.single())
    prompt = PROMPTS[0]
    prompt_logits(model, PROMPTS[1])  # a warm-up, say
    before = model.expert_tokens()
    load = ExpertLoad(model)
    prompt_logits(model, prompt)
    after = model.expert_tokens()
    assert before is not None and after is not None
    counts = after - before
    assert counts.shape == (2, 6)
    assert counts.sum(-1).tolist() == [3 * len(prompt)] * 2
    seen = [load.after_step() for _ in range(PERIOD_STEPS)]
    expected = (counts.amax(-1) / counts.double().mean(-1)).mean().item()
    assert seen == [None] * (PERIOD_STEPS - 1) + [pytest.approx(expected)]
    assert 1 < expected <= 2  # at most all tokens to the same half of the experts
    assert [load.after_step() for _ in range(PERIOD_STEPS)][-1] is None, "no token since"
    dense = load_model(
        make_small_model("LlamaForCausalLM", tmp_path / "dense", num_hidden_layers=1),
        dtype=torch.float32,
        device=CPU,
        comm=Communicator.single(),
    )
    assert [*map(ExpertLoad.after_step, [ExpertLoad(dense)] * PERIOD_STEPS)][-1] is None
