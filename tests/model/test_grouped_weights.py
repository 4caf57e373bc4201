"""Models whose weights have 4 or 8 bits on GPUs, loaded as there, with plain torch on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvmesh.kernels.linear import GroupedFormat, GroupedWeight, quantise
from kvmesh.workers.config import WeightFormatName
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model import storage
from kvmesh.workers.model.load import ServedModel, load_model
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.linears import WeightParts
from tests.model.attend import prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.quantised_checkpoints import CHECKPOINTS, quantise_checkpoint
from tests.model.small import change_config, make_small_model
from tests.model.test_experts import MXFP4, random_mxfp4

CPU = torch.device("cpu")


class OneOf(Communicator):
    """Loads a part; does not compute."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "multiplies_grouped", lambda _device: True)


def load(
    path: Path,
    weight_format: WeightFormatName = "exact",
    comm: Communicator | None = None,
    dtype: torch.dtype = torch.float32,
) -> ServedModel:
    comm = comm or Communicator.single()
    return load_model(path, dtype=dtype, device=CPU, comm=comm, weight_format=weight_format)


def stored(model: ServedModel) -> Iterator[tuple[str, Any]]:
    """Every weight of linears and experts, as it is stored."""
    parts = (*model._body.named_modules(), ("head", model._head))
    for name, module in parts:
        for key in ("weight", "gate_up", "down"):
            weight = getattr(module, key, None)
            if isinstance(weight, Tensor | GroupedWeight | WeightParts):
                yield f"{name}.{key}", weight


def values(weight: Any) -> Tensor:
    if isinstance(weight, WeightParts):
        return torch.cat([values(part) for part in weight.parts])
    return weight.decoded() if isinstance(weight, GroupedWeight) else weight.detach()


def assert_kept(path: Path, comm: Communicator | None = None) -> list[GroupedWeight]:
    """That the weights mean what the decoded ones are; those that are kept."""
    kept, plain = dict(stored(load(path, comm=comm))), dict(stored(load(path, "decoded", comm)))
    assert kept.keys() == plain.keys()
    assert all(isinstance(weight, Tensor) for weight in plain.values())
    for name, weight in kept.items():
        assert values(weight).equal(plain[name].detach()), name
    parts = [w.parts if isinstance(w, WeightParts) else (w,) for w in kept.values()]
    return [part for some in parts for part in some if isinstance(part, GroupedWeight)]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_keep_their_bits_and_their_values(name: str, tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    quantise_checkpoint(path, *CHECKPOINTS[name])
    found = assert_kept(path)
    layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    # Here each projection has an order of its own, so that none are joined.
    unordered = name == "gptq-act-order"
    assert len(found) == (7 if unordered else 4) * layers
    kind = {"int8": "uint8", "gptq-8": "uint8", "fp8-blocks": "e4m3", "fp8-tensor": "e4m3"}
    assert {weight.kind for weight in found} == {kind.get(name, "uint4")}
    indexed = unordered or name == "fp8-blocks"  # of 40 inputs
    assert {weight.index is not None for weight in found} == {indexed}


@pytest.mark.parametrize("name", ["gptq-4", "gptq-act-order", "fp8-blocks"])
def test_a_rank_has_its_part(name: str, tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    quantise_checkpoint(path, *CHECKPOINTS[name])
    assert_kept(path, OneOf(1, 2))


@pytest.mark.parametrize("case", ["qwen3-moe", "phi3", "internlm2"])
def test_experts_joined_and_renamed_weights_keep_their_bits(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path / "model", **overrides)
    quantise_checkpoint(path, *CHECKPOINTS["gptq-4"])
    found = assert_kept(path)
    assert any(weight.dim() == 3 for weight in found) == (case == "qwen3-moe")
    logits, plain = (
        prompt_logits(load(path, weight_format), PROMPTS[0])
        for weight_format in ("exact", "decoded")
    )
    torch.testing.assert_close(logits, plain, rtol=0, atol=3e-5)


def test_experts_in_mxfp4_keep_their_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, overrides = CASES["gpt-oss"]
    path = make_small_model("GptOssForCausalLM", tmp_path, **overrides)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, num_inputs, num_outputs = tensors.pop(name).shape
        blocks, scales = random_mxfp4(experts, num_outputs, num_inputs)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    change_config(path, quantization_config=MXFP4)
    found = assert_kept(path)
    assert {weight.kind for weight in found} == {"e2m1"}
    assert all(weight.num_bytes * 8 == 4.25 * weight.shape.numel() for weight in found)


def test_projections_that_are_stored_differently_are_multiplied_apart(tmp_path: Path) -> None:
    """Values in bfloat16, next to queries and keys in 4 bits."""
    path = make_small_model("Qwen2ForCausalLM", tmp_path / "model")  # with biases
    quantise_checkpoint(path, *CHECKPOINTS["awq"])
    tensors = load_file(path / "model.safetensors")
    plain = load_file(path.with_name("model-plain") / "model.safetensors")
    for name in list(tensors):
        if ".v_proj.q" in name or ".v_proj.s" in name:
            del tensors[name]
    tensors |= {name: plain[name] for name in plain if name.endswith("v_proj.weight")}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert_kept(path)
    model = load(path)
    assert any(isinstance(weight, WeightParts) for _, weight in stored(model))
    logits, expected = (prompt_logits(one, PROMPTS[0]) for one in (model, load(path, "decoded")))
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("weight_format", "tied"), [("int8", False), ("int4", False), ("int4", True), ("fp8", False)]
)
def test_weights_are_rounded_at_load(
    weight_format: GroupedFormat, tied: bool, tmp_path: Path
) -> None:
    architecture, overrides = CASES["mixtral"]
    path = make_small_model(architecture, tmp_path, **overrides, tie_word_embeddings=tied)
    plain = dict(stored(load(path, "decoded", dtype=torch.bfloat16)))
    found = dict(stored(load(path, weight_format, dtype=torch.bfloat16)))
    for name, weight in found.items():
        want = plain[name].detach()
        if name == "head.weight" and not tied:
            want = quantise(want, "int8" if weight_format == "int4" else weight_format).decoded()
        elif name.endswith(("_proj.weight", "qkv.weight", "gate_up", "down")):
            want = quantise(want, weight_format).decoded()
        assert values(weight).equal(want), name
    if tied:
        assert found["head.weight"].data_ptr() == found["embed_tokens.weight"].data_ptr()
    assert sum(isinstance(weight, GroupedWeight) for weight in found.values()) > 4


@pytest.mark.parametrize("on_gpu", [False, True])
def test_weights_that_cannot_be_rounded_are_refused(
    on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "multiplies_grouped", lambda _device: on_gpu)
    path = make_small_model("LlamaForCausalLM", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="int4 needs finite weights") as caught:
        load(path, "int4")
    assert caught.value.field == "weight_format"
    load(path)
