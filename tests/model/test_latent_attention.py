"""Checkpoints of models with latent attention, and how ranks divide them."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import load_model
from kvmesh.workers.model.sizes import check_tp
from kvmesh.workers.page_geometry import KVShape, format_for, geometry_of
from kvmesh.workers.parallel.comm import Communicator
from tests.model.attend import prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.quantised_checkpoints import CHECKPOINTS, quantise_checkpoint
from tests.model.small import change_config, make_small_model

CPU = torch.device("cpu")


def logits_of(path: Path) -> torch.Tensor:
    model = load_model(path, dtype=torch.float32, device=CPU, comm=Communicator.single())
    logits = prompt_logits(model, PROMPTS[0])
    assert logits is not None
    return logits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    architecture, overrides = CASES["deepseek-v3"]
    return make_small_model(architecture, tmp_path / "model", **overrides)


def test_layers_that_predict_further_tokens_are_left_out(path: Path) -> None:
    """They follow the model's own, and are used only where the configuration has them."""
    expected = logits_of(path)
    file = path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    change_config(path, num_mtp_layers=None, num_nextn_predict_layers=1)
    assert logits_of(path).equal(expected)
    change_config(path, num_nextn_predict_layers=0)
    with pytest.raises(UnsupportedModelError, match=r"no place for tensor model\.layers\.2"):
        logits_of(path)


def test_what_is_stored_in_blocks_of_fp8_is_decoded_before_it_is_divided(path: Path) -> None:
    quantise_checkpoint(path, *CHECKPOINTS["fp8-blocks"])
    assert logits_of(path).equal(logits_of(path.with_name("model-plain")))


def test_what_chooses_experts_is_not_rounded(path: Path) -> None:
    model = load_model(path, dtype=torch.bfloat16, device=CPU, comm=Communicator.single())
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    name = "layers.1.mlp.gate.e_score_correction_bias"
    found = dict(model._body.named_buffers())[name]
    assert found.equal(tensors[f"model.{name}"])
    assert not found.equal(found.bfloat16().float())


def test_ranks_divide_heads_and_each_has_all_latents(path: Path) -> None:
    facts = read_facts(path)
    assert (facts.num_kv_heads, facts.head_dim, facts.values_in_keys) == (1, 40, 32)
    for tp, kvp in ((8, 1), (1, 8), (4, 2)):
        check_tp(facts, tp, kvp)
    for tp, kvp, field in ((3, 1, "tp"), (16, 1, "tp"), (4, 4, "kvp")):
        with pytest.raises(ConfigError, match="8 heads") as caught:
            check_tp(facts, tp, kvp)
        assert caught.value.field == field
    one, shares, dealt = (
        geometry_of(
            get_format("exact"), KVShape.of(facts), page_size=16, itemsize=2, tp=tp, kvp=kvp
        )
        for tp, kvp in ((1, 1), (4, 1), (1, 4))
    )
    assert one.hot_page_bytes == one.sealed_page_bytes == 2 * 16 * 40 * 2
    assert shares.hot_page_bytes == dealt.hot_page_bytes == one.hot_page_bytes
    tokens = 16 * 8
    of_one, of_shares, of_dealt = (
        each.bytes_held(one.need(tokens)) for each in (one, shares, dealt)
    )
    assert (of_shares, of_dealt) == (4 * of_one, of_one)


def test_formats_that_cannot_store_latents_are_refused_before_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    assert format_for("8", path).values_in_keys == 32
    assert format_for("default", path).name == "int8", "the default can store them"
    with pytest.raises(ConfigError, match=r"k4v2.*exact, int8, fp8, int4") as caught:
        format_for("42", path)
    assert caught.value.field == "kv_format"
