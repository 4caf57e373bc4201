"""The text models of checkpoints with images, against those checkpoints' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvmesh.workers.errors import UnsupportedModelError
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.load import load_model
from kvmesh.workers.model.text_part import placeholder_tokens, text_config
from kvmesh.workers.parallel.comm import Communicator
from tests.model.attend import generate_greedily, prompt_logits
from tests.model.cases import CASES, PROMPTS
from tests.model.small import change_config, make_small_model

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_QWEN_TOKENS = {"image_token_id": 130, "video_token_id": 129}
_OUTPUTS = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
# class -> (the text model's case, vision_config, and what else its config says)
WITH_IMAGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama4ForConditionalGeneration": (
        "llama4",
        {**_VISION, **_OUTPUTS},
        {"image_token_index": 130, "boi_token_index": 128, "eoi_token_index": 129},
    ),
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        _VISION,
        {"image_token_index": 130, "mm_tokens_per_image": 4},
    ),
    "Mistral3ForConditionalGeneration": (
        "mistral",
        {**_VISION, "model_type": "pixtral", "head_dim": 16},
        {"image_token_index": 130, "spatial_merge_size": 1, "tie_word_embeddings": False},
    ),
    "Qwen3_5ForConditionalGeneration": ("qwen3.5", _QWEN_VISION, _QWEN_TOKENS),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3.5-moe", _QWEN_VISION, _QWEN_TOKENS),
}


def make_with_images(name: str, directory: Path) -> Path:
    case, vision, others = WITH_IMAGES[name]
    text = {k: v for k, v in CASES[case][1].items() if k != "final_logit_softcapping"}
    return make_small_model(name, directory, text_config=text, vision_config=vision, **others)


def rename_weights(path: Path, *, newer: bool) -> None:
    """Of a checkpoint: the text model's as `model.language_model.*` and `lm_head.*`, or as
    `language_model.model.*` and `language_model.lm_head.*`, which are both found."""
    renamed = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        plain = name.replace("language_model.model.", "model.language_model.")
        plain = plain.removeprefix("language_model.") if "lm_head" in plain else plain
        if not newer:
            plain = plain.replace("model.language_model.", "language_model.model.")
            plain = f"language_model.{plain}" if plain.startswith("lm_head") else plain
        renamed[plain] = tensor
    save_file(renamed, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_text_is_computed_as_by_the_whole_checkpoint(name: str, tmp_path: Path) -> None:
    path = make_with_images(name, tmp_path)
    theirs = getattr(transformers, name).from_pretrained(path, attn_implementation="eager")
    prompt = [token for token in PROMPTS[0] if token < 128]
    with torch.inference_mode():
        expected = theirs(input_ids=torch.tensor([prompt])).logits[0]
    generated = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    facts = read_facts(path)
    assert facts.text_of == name
    text = [
        weight.numel()
        for part, weight in theirs.named_parameters()
        if not any(other in part for other in ("vision", "visual", "projector"))
    ]
    assert facts.weight_bytes == 4 * sum(text)
    spread = max(1.0, expected.std().item())
    for newer in (True, False):
        rename_weights(path, newer=newer)
        ours = load_model(
            path, dtype=torch.float32, device=torch.device("cpu"), comm=Communicator.single()
        )
        logits = prompt_logits(ours, prompt)
        assert logits is not None
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * spread)
        assert generate_greedily(ours, [prompt], 6) == [generated[0, len(prompt) :].tolist()]


def test_tokens_of_images_are_known_by_the_keys_that_name_them() -> None:
    qwen = {"architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 7}
    assert placeholder_tokens(qwen) == {7: "image_token_id", 248057: "video_token_id"}
    gemma = {"architectures": ["Gemma3ForConditionalGeneration"], "image_token_id": 7}
    assert placeholder_tokens(gemma) == {7: "image_token_index"}
    assert placeholder_tokens({"architectures": ["LlamaForCausalLM"], "image_token_id": 7}) == {}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"text_config": None}, "must have a text_config"),
        ({"text_config": {"model_type": "ministral3"}}, "of type ministral3, which is not"),
        ({"model_type": "mistral"}, "must have model type mistral3, got mistral"),
        ({"fusion_layers": [3, 7]}, "fusion_layers of Mistral3ForConditionalGeneration may"),
    ],
)
def test_what_would_be_computed_incorrectly_is_named(
    changes: dict[str, Any], complaint: str
) -> None:
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral"},
        "image_token_index": 10,
    }
    text_config(config, "config.json")
    with pytest.raises(UnsupportedModelError, match=complaint):
        text_config({**config, **changes}, "config.json")


def test_keys_of_the_text_model_are_judged_like_its_own(tmp_path: Path) -> None:
    path = make_with_images("Mistral3ForConditionalGeneration", tmp_path)
    text = json.loads((path / "config.json").read_text())["text_config"]
    change_config(path, text_config={**text, "use_logn_attn": True})
    with pytest.raises(UnsupportedModelError, match="use_logn_attn in its config"):
        read_facts(path)
