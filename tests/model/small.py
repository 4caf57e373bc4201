"""Small models with random weights, saved as ordinary checkpoints.

    path = make_small_model("LlamaForCausalLM", tmp_path, num_hidden_layers=2)

Weights are large enough for attention to be far from uniform and for logits to
differ, so that a wrong mask, scale or rotation is noticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
import transformers

VOCAB_SIZE = 131  # prime, so no number of ranks divides it

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


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TRAINING_TEXT = [
    "The pages of a sequence are dealt to the ranks, and the ranks agree on every sum.",
    "Die Würde der Bäume: 日本語のテキスト 👩‍👩‍👧 naïve café",
]


def make_small_tokenizer(directory: Path) -> int:
    """A byte-level BPE tokenizer with a chat template in `directory`; returns its vocabulary."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_TRAINING_TEXT, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    raw.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return int(raw.get_vocab_size())


def make_small_gguf(file: Path, source: Path, leave_out: str = "", **metadata: Any) -> Path:
    """The Llama model in directory `source` as a GGUF file, including its tokenizer.

    leave_out: name of a tensor; metadata: further keys, with __ for dots
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    config = model.config
    raw = json.loads((source / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(raw["vocab"], key=raw["vocab"].__getitem__))
    writer.add_token_types([3, 3, 3] + [1] * (len(raw["vocab"]) - 3))
    writer.add_token_merges([" ".join(pair) for pair in raw["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == leave_out:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        array = weight.numpy()
        for projection, count in heads.items():
            if projection in name:  # GGUF's Llama rotates neighbours, transformers halves
                array = array.reshape(count, 2, -1, array.shape[-1]).swapaxes(1, 2)
                array = array.reshape(weight.shape)
        gguf_name = names.get_name(name, (".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
