"""The counts of weights against the ranks' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_model import RandomWeights
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import ServedModel, build_model
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.model.stored import read_config
from kvmesh.workers.model.weight_counts import WeightCounts
from kvmesh.workers.parallel.comm import Communicator
from tests.model.cases import CASES
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


def numbers_of(model: ServedModel) -> int:
    """In the weights of a rank's model, each counted once."""
    stored = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
        for module in (model._body, model._head)
        for weight in module.parameters()
    }
    return sum(stored.values()) // 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_as_many_numbers_as_counted(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    facts = read_facts(path)
    config = read_config(facts, path)
    contents = standard_keys(json.loads((path / "config.json").read_text()), path)
    sizes = ModelSizes.of(contents, path)
    counts = WeightCounts.of(sizes, contents, path)
    # There are 8 heads, and except for latents 4 KV heads.
    assert sizes.tp_choices == ([1, 2, 4, 8] if sizes.values_in_keys else [1, 2, 4])
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
