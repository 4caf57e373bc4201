"""Small models with random weights, saved as real checkpoints are.

    path = make_small_model("LlamaForCausalLM", tmp_path, num_hidden_layers=2)

Weights are large enough for attention to be far from uniform and for logits to
differ, so that a wrong mask, scale or rotation shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 131  # prime: no number of ranks divides it

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_small_model(
    architecture: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """A model of `architecture` (LlamaForCausalLM, ...) in `directory`, which is returned.

    overrides: of the configuration's fields
    """
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**_COMMON, **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1 or "norm" in name:
                weight.add_(noise, alpha=0.2)  # norms around their identity, biases around 0
            else:
                weight.copy_(noise * (1.5 / weight.shape[-1] ** 0.5))
    model.to(dtype).save_pretrained(directory, safe_serialization=True)
    return directory
