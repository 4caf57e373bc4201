"""RoPE: undone, checked with the models' own keys; fixed at load; and overridden."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvmesh.kernels.formats.comparison.nuq.rope import RopePairs, phases
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import ServedModel, load_model
from kvmesh.workers.model.rope import override_rope
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.rope_override import RopeOverride
from tests.model.attend import prompt_logits
from tests.model.cases import CASES, LLAMA3
from tests.model.small import change_config, make_small_model, transformers_model


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_keys_of_a_token_are_equal_at_all_positions_once_rope_is_undone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first layer, where a key depends only on its token and position, also after recurrent
    layers whose output is 0."""
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    model = load_model(
        path, dtype=torch.float32, device=torch.device("cpu"), comm=Communicator.single()
    )
    for name, part in model._body.named_modules():
        if name.endswith(("linear_attn.out_proj", "temporal_block.linear_out", "mamba.out_proj")):
            width = model.facts.hidden_size
            nothing = lambda x, width=width: x.new_zeros(*x.shape[:-1], width)  # noqa: E731
            monkeypatch.setattr(part, "forward", nothing)
    keys: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, args: AttendArgs) -> Tensor:
        if layer == 0:
            keys.append(k[..., model.facts.values_in_keys :].clone())
        return q.new_zeros(*q.shape[:2], v.shape[2])

    positions = torch.tensor([0, 1, 2, 7, 100, 255])
    model.forward(torch.full((6,), 17), positions, attend, positions[:0])
    back = phases(model.ropes[0].inv_freq, positions).conj().unsqueeze(1)
    plain = RopePairs(model.ropes[0].interleaved).rotate(keys[0], back)
    spread = (plain - plain[:1]).abs().amax()
    assert spread < 1e-4 * plain.abs().amax()
    turned = bool((keys[0] - keys[0][:1]).abs().amax() > 0.1 * plain.abs().amax())
    assert turned == bool(model.ropes[0].inv_freq.any()), "layers without RoPE turn nothing"


FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.1, 3.0, 5.0, 9.0]}


def load(path: Path, **options: Any) -> ServedModel:
    return load_model(
        path,
        dtype=torch.float32,
        device=torch.device("cpu"),
        comm=Communicator.single(),
        **options,
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 20.0},
    ],
)
def test_frequencies_are_those_of_transformers_at_every_length(
    parameters: dict[str, Any], tmp_path: Path
) -> None:
    """At every length that the model supports: none of these changes within it."""
    if parameters["rope_type"] in ("llama3", "yarn"):
        parameters = {**parameters, "original_max_position_embeddings": 64}
    parameters = {"rope_theta": 1e4, **parameters}
    path = make_small_model(
        "LlamaForCausalLM", tmp_path, num_hidden_layers=1, rope_parameters=parameters
    )
    model = load(path)
    theirs = transformers_model(path).model.rotary_emb
    x = torch.zeros(1, 1, 64)
    ours = model.rotary_emb
    for length in (1, 100, model.facts.max_model_len):
        positions = torch.tensor([[0, length // 2, length - 1]])
        torch.testing.assert_close(ours(x, positions), theirs(x, positions), rtol=0, atol=1e-6)


def test_the_longest_sequence_decides_between_the_factors_of_longrope(tmp_path: Path) -> None:
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
    path = make_small_model(
        "Phi3ForCausalLM",
        tmp_path,
        num_hidden_layers=1,
        original_max_position_embeddings=64,
        rope_parameters=parameters,
    )
    theirs = transformers_model(path)
    for longest, length in ((None, 256), (65, 65), (64, 64), (10, 10)):
        ours = load(path, max_model_len=longest).rotary_emb
        x, positions = torch.zeros(1, 1, 64), torch.tensor([[0, 3, length - 1]])
        expected = theirs.model.rotary_emb(x, positions)
        torch.testing.assert_close(ours(x, positions), expected, rtol=0, atol=1e-6)
    # A short sequence next to a possible long one: transformers would use the short factors.
    short = torch.tensor([[0, 1, 2]])
    long = load(path).rotary_emb(x, short)
    assert (long[0] - theirs.model.rotary_emb(x, short)[0]).abs().amax() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "same_as"),
    [
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"type": "yarn", "factor": 2.0},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
        ),
        (
            {"type": "yarn", "factor": 4.0, "trained_len": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        # Dynamic NTK with factor 1, at the length that the prompt has.
        ({"type": "ntk", "factor": 2.0}, {"rope_type": "dynamic", "factor": 1.0}),
    ],
)
@pytest.mark.parametrize("own", [None, "llama3"])
def test_an_override_computes_what_the_same_scaling_does_in_transformers(
    override: dict[str, Any], same_as: dict[str, Any], own: str | None, tmp_path: Path
) -> None:
    scaling: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    if own == "llama3":
        scaling["rope_parameters"] = {**LLAMA3, "original_max_position_embeddings": 256}
    path = make_small_model("LlamaForCausalLM", tmp_path, num_hidden_layers=2, **scaling)
    plain = load(path)
    rope = RopeOverride(**override)
    model = load(path, rope=rope)
    assert model.facts.max_model_len == 512
    assert model.facts.revision != plain.facts.revision
    assert str(rope) in model.facts.rope
    change_config(path, rope_parameters={"rope_theta": 1e4, **same_as})
    prompt = [(7 * i + 3) % 131 for i in range(512)]
    with torch.inference_mode():
        expected = transformers_model(path)(torch.tensor([prompt])).logits[0]
    logits, unscaled = prompt_logits(model, prompt), prompt_logits(plain, prompt)
    assert logits is not None
    assert unscaled is not None
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
    assert (unscaled - expected).abs().amax() > 0.1


@pytest.mark.parametrize(("share", "dim"), [(None, 64), (0.5, 32), (0.25, 16)])
def test_ntk_scales_by_the_channels_that_are_rotated(share: float | None, dim: int) -> None:
    """As in transformers' dynamic scaling, of a model that rotates a part of each head."""
    own: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    if share is not None:
        own["partial_rotary_factor"] = share
    config = SimpleNamespace(
        rope_parameters=own, hidden_size=256, num_attention_heads=4, max_position_embeddings=256
    )
    override_rope(config, RopeOverride(type="ntk", factor=2.0), 256)
    scaled = config.rope_parameters
    assert scaled["rope_theta"] == pytest.approx(1e4 * 2.0 ** (dim / (dim - 2)))
    assert scaled.get("partial_rotary_factor") == share
    assert config.max_position_embeddings == 512


def test_an_override_leaves_layers_with_a_window_alone(tmp_path: Path) -> None:
    path = make_small_model("Gemma3ForCausalLM", tmp_path, head_dim=16, num_hidden_layers=6)
    before, after = load(path), load(path, rope=RopeOverride(type="linear", factor=2.0))
    for layer, (old, new) in enumerate(zip(before.ropes, after.ropes, strict=True)):
        factor = 2.0 if before.facts.sliding_windows[layer] is None else 1.0
        torch.testing.assert_close(new.inv_freq * factor, old.inv_freq)
