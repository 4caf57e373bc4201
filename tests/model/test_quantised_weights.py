"""Quantised checkpoints compute what the values of their weights compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import ServedModel, load_model
from kvmesh.workers.model.quantised_weights import unpacked
from kvmesh.workers.parallel.comm import Communicator
from tests.model.attend import prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.quantised_checkpoints import CHECKPOINTS, GPTQ, pack_dense, quantise_checkpoint
from tests.model.small import make_small_model

CPU = torch.device("cpu")


def load(path: Path, dtype: torch.dtype = torch.float32) -> ServedModel:
    return load_model(path, dtype=dtype, device=CPU, comm=Communicator.single())


def logits_of(path: Path) -> torch.Tensor:
    logits = prompt_logits(load(path), PROMPTS[0])
    assert logits is not None
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_the_weights_that_are_meant(name: str, tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    before = logits_of(path)
    quantise_checkpoint(path, *CHECKPOINTS[name])
    found = logits_of(path)
    assert found.equal(logits_of(path.with_name("model-plain")))
    assert not torch.allclose(found, before, atol=1e-3), "the weights were not quantised"


@pytest.mark.parametrize("case", ["qwen3-moe", "phi3", "internlm2"])
def test_experts_joined_and_renamed_weights_are_decoded(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path / "model", **overrides)
    quantise_checkpoint(path, *CHECKPOINTS["gptq-4"])
    assert logits_of(path).equal(logits_of(path.with_name("model-plain")))


def test_every_rank_has_its_part(tmp_path: Path) -> None:
    class OneOf(Communicator):
        def __init__(self, rank: int, size: int) -> None:
            self.rank, self.size = rank, size

    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    quantise_checkpoint(path, *CHECKPOINTS["gptq-act-order"])
    for rank in range(2):
        ranks = [
            load_model(folder, dtype=torch.bfloat16, device=CPU, comm=OneOf(rank, 2))
            for folder in (path, path.with_name("model-plain"))
        ]
        found, expected = (dict(model._body.named_parameters()) for model in ranks)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 33, 100])
def test_numbers_are_unpacked(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, count), generator=generator, dtype=torch.int32)
    assert unpacked(pack_dense(codes.tolist(), bits), bits, count).int().equal(codes)


@pytest.mark.parametrize(
    ("quantisation", "complaint"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes; only AWQ, GPTQ"),
        ({}, "quantised by None"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 3}, "3 bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}},
            "sparse",
        ),
        ({"quant_method": "compressed-tensors", "transform_config": {"R1": {}}}, "rotated"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    quantisation: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path)
    contents = json.loads((path / "config.json").read_text())
    quantisation = quantisation or {"quant_method": None}
    (path / "config.json").write_text(json.dumps({**contents, "quantization_config": quantisation}))
    with pytest.raises(UnsupportedModelError, match=complaint):
        read_facts(path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("qweight", lambda t: t[:-1]),
        ("qweight", lambda t: t[:, :-1]),
        ("qzeros", lambda t: t[:, :1]),
        ("scales", lambda t: t[:, :-1]),
        ("g_idx", lambda t: t + 100),
        ("g_idx", lambda t: t[:-1]),
    ],
)
def test_malformed_parts_are_named(part: str, change: Any, tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    quantise_checkpoint(path, *CHECKPOINTS["gptq-4"])
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    name = f"model.layers.1.mlp.down_proj.{part}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down_proj.* is malformed"):
        load(path)


def test_quantised_tensors_without_a_configuration_are_refused(tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    quantise_checkpoint(path, *CHECKPOINTS["fp8-tensor"])
    contents = json.loads((path / "config.json").read_text())
    del contents["quantization_config"]
    (path / "config.json").write_text(json.dumps(contents))
    with pytest.raises(UnsupportedModelError, match="F8_E4M3"):
        load(path)


def test_what_a_method_does_not_know_is_refused(tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    quantise_checkpoint(path, *CHECKPOINTS["gptq-4"])
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.channel_scale"] = torch.ones(64)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="channel_scale"):
        load(path)


def test_methods_are_checked_before_weights(tmp_path: Path) -> None:
    """`kvmesh plan` and the control plane read no tensor."""
    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    quantise_checkpoint(path, {**GPTQ, "bits": 4}, CHECKPOINTS["gptq-4"][1])
    assert read_facts(path).num_layers == 3
