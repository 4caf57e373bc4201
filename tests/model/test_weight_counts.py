"""The counts of weights against the ranks' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_model import RandomWeights
from kvmesh.kernels.linear import GroupedWeight
from kvmesh.workers.config import WEIGHT_FORMATS
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model import storage
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import ServedModel, build_model, load_model
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.model.stored import read_config
from kvmesh.workers.model.weight_coding import StoredWeights
from kvmesh.workers.model.weight_counts import WeightCounts
from kvmesh.workers.parallel.comm import Communicator
from tests.model.cases import CASES
from tests.model.quantised_checkpoints import CHECKPOINTS, quantise_checkpoint
from tests.model.small import VOCAB_SIZE, make_small_model

CPU = torch.device("cpu")


class _OneOf(Communicator):
    """A rank whose group is not there: enough to be given its weights."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class _Untied(RandomWeights):
    """A checkpoint that has no output layer of its own if it is tied, and no packed experts."""

    def __contains__(self, name: str) -> bool:
        return name != "lm_head.weight" and not name.endswith("_blocks")


# Models that ranks divide in different ways.
CODED: tuple[str, ...] = (
    *("llama-tied", "phi3", "glm4", "internlm2", "qwen3-moe", "mixtral", "qwen3-next"),
    *("recurrent-gemma", "qwen3.5-moe", "granite-hybrid", "bamba", "llama4", "deepseek-v3"),
    "gpt-oss",
)


def grouped_of(model: ServedModel) -> list[GroupedWeight]:
    """The weights of a rank's model that have 4 or 8 bits."""
    modules = [*model._body.modules(), *model._head.modules()]
    found = [getattr(part, key, None) for part in modules for key in ("weight", "gate_up", "down")]
    return [weight for weight in found if isinstance(weight, GroupedWeight)]


def bytes_of(model: ServedModel) -> int:
    return 2 * numbers_of(model) + sum(weight.num_bytes for weight in grouped_of(model))


def numbers_of(model: ServedModel) -> int:
    """In the weights of a rank's model in bfloat16, each counted once."""
    stored = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
        for module in (model._body, model._head)
        for weight in module.parameters()
    }
    return sum(stored.values()) // 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_as_many_numbers_and_bytes_as_counted(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    facts = read_facts(path)
    config = read_config(facts, path)
    contents = standard_keys(json.loads((path / "config.json").read_text()), path)
    sizes = ModelSizes.of(contents, path)
    counts = WeightCounts.of(sizes, contents, path)
    # There are 8 heads, and except for latents 4 KV heads.
    assert sizes.tp_choices == ([1, 2, 4, 8] if sizes.values_in_keys else [1, 2, 4])
    weight_format = WEIGHT_FORMATS[1 + len(case) % 3]
    for tp in sizes.tp_choices:
        ranks = [
            build_model(
                facts,
                config,
                _Untied(torch.bfloat16, CPU),
                dtype=torch.bfloat16,  # which is not packed
                device=CPU,
                comm=_OneOf(rank, tp),
            )
            for rank in range(tp)
        ]
        assert counts.of_rank(tp) == max(map(numbers_of, ranks))
        if tp == 2 and case in CODED:
            monkeypatch.setattr(storage, "multiplies_grouped", lambda _device: True)
            coded = [
                build_model(
                    facts,
                    config,
                    _Untied(torch.bfloat16, CPU),
                    dtype=torch.bfloat16,
                    device=CPU,
                    comm=_OneOf(rank, tp),
                    weight_format=weight_format,
                )
                for rank in range(tp)
            ]
            monkeypatch.undo()
            stored = StoredWeights.of(weight_format, contents)
            assert counts.bytes_of_rank(tp, 1, stored) == max(map(bytes_of, coded))


@pytest.mark.parametrize("name", ["gptq-4", "gptq-8", "awq", "packed-4", "fp8-tensor"])
def test_a_quantised_checkpoint_takes_as_many_bytes_as_its_configuration_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "multiplies_grouped", lambda _device: True)
    path = make_small_model("LlamaForCausalLM", tmp_path / "model")
    config, quantise = CHECKPOINTS[name]
    if name == "packed-4":
        weights = {"num_bits": 4, "group_size": 32, "symmetric": False}
        config = {**config, "ignore": ["lm_head"], "config_groups": {"all": {"weights": weights}}}
    quantise_checkpoint(path, config, quantise)
    contents = standard_keys(json.loads((path / "config.json").read_text()), path)
    counts = WeightCounts.of(ModelSizes.of(contents, path), contents, path)
    model = load_model(path, dtype=torch.bfloat16, device=CPU, comm=Communicator.single())
    found = counts.bytes_of_rank(1, 1, StoredWeights.of("exact", contents))
    # The tests' scales of these are in fp32, where such checkpoints have them in half of that.
    wide = {"packed-4": 2}.get(name, 0)
    scales = [w.scales.numel() for w in grouped_of(model)]
    assert found + wide * sum(scales) == bytes_of(model)


MIXTURE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
}
QWEN3_MOE = MIXTURE | {
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
}


LLAMA4 = MIXTURE | {
    "head_dim": 16,
    "intermediate_size": 32,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
}


@pytest.mark.parametrize(
    ("model_type", "config", "idle_experts"),
    [
        ("qwen3_moe", QWEN3_MOE, 1 * 4),
        ("llama4_text", LLAMA4, 2 * 3),
        ("mixtral", MIXTURE | {"num_local_experts": 4, "num_experts_per_tok": 1}, 4 * 3),
    ],
)
def test_mixtures_of_experts_are_counted_like_transformers(
    model_type: str, config: dict[str, Any], idle_experts: int
) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    contents = {**config, "architectures": [type(theirs).__name__], "model_type": model_type}
    sizes = ModelSizes.of(contents, "config.json")
    counts = WeightCounts.of(sizes, contents, "config.json")
    assert counts.total == sum(weight.numel() for weight in theirs.parameters())
    assert counts.idle == idle_experts * 3 * 64 * sizes.moe_intermediate_size
    assert counts.multiplied < counts.total - counts.idle


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"architectures": ["MambaForCausalLM"]}, UnsupportedModelError, "MambaForCausalLM"),
        ({"architectures": []}, UnsupportedModelError, "of model type llama"),
        ({"hidden_size": None}, ConfigError, "hidden_size"),
        ({"num_hidden_layers": True}, ConfigError, "num_hidden_layers"),
        ({"vocab_size": "many"}, ConfigError, "vocab_size"),
    ],
)
def test_what_cannot_be_counted_is_named(
    changes: dict[str, Any], error: type[ConfigError], complaint: str
) -> None:
    config = MIXTURE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | changes
    with pytest.raises(error, match=complaint):
        ModelSizes.of(config, "config.json")
