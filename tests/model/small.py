"""Small models with random weights, saved as ordinary checkpoints.

    path = make_small_model("LlamaForCausalLM", tmp_path, num_hidden_layers=2)

Weights are large enough for attention to be far from uniform and for logits to
differ, so that a wrong mask, scale or rotation is noticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
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
    if architecture == "InternLM2ForCausalLM":
        return _make_internlm2(directory, seed, dtype, overrides)
    if architecture == "InternLM3ForCausalLM":  # its modules are Llama's
        model_class, config_class = transformers.LlamaForCausalLM, transformers.InternLM3Config
    else:
        model_class = getattr(transformers, architecture)
        config_class = model_class.config_class
    if "text_config" in overrides:  # of several modalities
        text = {**_COMMON, **overrides["text_config"]}
        config = config_class(**{**overrides, "text_config": text})
    else:
        config = config_class(**{**_COMMON, **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith(".A_log"):  # memories that last, not rounding that norms enlarge
                weight.copy_(noise * 0.2 - 2.0)
            elif weight.dim() == 1 or "norm" in name:
                weight.add_(noise, alpha=0.2)  # norms around their identity, biases around 0
            else:
                weight.copy_(noise * (1.5 / weight.shape[-1] ** 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    if dtype != torch.float32:  # RoPE of some vision models is complex
        model.to(dtype)
    model.save_pretrained(directory, safe_serialization=True)
    if architecture == "InternLM3ForCausalLM":
        change_config(directory, architectures=[architecture], auto_map=_OWN_CODE)
    return directory


_OWN_CODE = {"AutoModelForCausalLM": "modeling.Model"}


def change_config(directory: Path, **changes: Any) -> None:
    """Keys of the model's config.json; None removes one."""
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


def transformers_model(directory: Path, **options: Any) -> Any:
    """transformers' own model of one that `make_small_model` made, with eager attention."""
    twin = directory / _TWIN
    source = twin if twin.exists() else directory
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", trust_remote_code=False, **options
    )


def first_choices(model: Any, prompt: list[int], output: list[int]) -> list[int]:
    """After the prompt, and after each token of `output` but the last, transformers' first choice.

    It equals `output` exactly if their `generate` gives it, which would take a step for each token.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    chosen: list[int] = logits.argmax(-1).tolist()
    return chosen


_TWIN = "as_llama"


def _make_internlm2(
    directory: Path, seed: int, dtype: torch.dtype, overrides: dict[str, Any]
) -> Path:
    """A Llama model, and the same one as InternLM2's own code stores it."""
    bias = overrides.pop("bias", False)
    twin = make_small_model(
        "LlamaForCausalLM",
        directory / _TWIN,
        seed=seed,
        dtype=dtype,
        attention_bias=bias,
        **overrides,
    )
    config = json.loads((twin / "config.json").read_text())
    kv_heads = config["num_key_value_heads"]
    tensors = safetensors.torch.load_file(twin / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias") if bias else ("weight",):
            parts = [
                tensors.pop(f"model.layers.{layer}.self_attn.{side}_proj.{kind}") for side in "qkv"
            ]
            # [KV head, its queries and its key and its value, head_dim, …]
            by_head = [part.unflatten(0, (kv_heads, -1, config["head_dim"])) for part in parts]
            joined = torch.cat(by_head, dim=1).flatten(0, 2)
            tensors[f"model.layers.{layer}.attention.wqkv.{kind}"] = joined.contiguous()
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in _INTERNLM2_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    safetensors.torch.save_file(renamed, directory / "model.safetensors")
    del config["attention_bias"], config["mlp_bias"]
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    config |= {"bias": bias, "auto_map": _OWN_CODE}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


_INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


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


# Model type -> its name in GGUF.
_GGUF_NAMES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
}

_TOKEN_TYPES = dict.fromkeys(range(3), gguf.TokenType.CONTROL)


def make_small_gguf(
    file: Path,
    source: Path,
    leave_out: str = "",
    *,
    pieces: bool = False,
    pre: str = "gpt-2",
    token_types: Mapping[int, gguf.TokenType] = _TOKEN_TYPES,
    weights: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **metadata: Any,
) -> Path:
    """The model in directory `source` as a GGUF file, including its tokenizer, as llama.cpp
    writes it.

    leave_out: name of a tensor; metadata: further keys, with __ for dots
    pieces: with a tokenizer of SentencePiece instead of the model's own
    pre: what llama.cpp calls the way in which text is split; none if empty
    token_types: of tokens that are not normal ones, by id
    weights: how matrices are stored
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    config = model.config
    raw = json.loads((source / "tokenizer.json").read_text())["model"]
    architecture = _GGUF_NAMES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_gguf_rope(writer, config)
    if config.model_type in ("llama", "phi3"):
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        rotary = config.rope_parameters.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(rotary * head_dim))
    elif config.model_type not in ("qwen2", "olmo2", "olmo3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type in ("gemma2", "gemma3_text", "olmo3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "olmo3":
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_sliding_window_pattern(slides)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_vocab_size(config.vocab_size)
    if pieces:
        _add_pieces(writer, config.vocab_size)
    else:
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(sorted(raw["vocab"], key=raw["vocab"].__getitem__))
        ids = range(len(raw["vocab"]))
        writer.add_token_types([token_types.get(number, gguf.TokenType.NORMAL) for number in ids])
        writer.add_token_merges([" ".join(pair) for pair in raw["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in metadata.items():
        add = _GGUF_WRITERS[type(value)]
        add(writer, key.replace("__", "."), value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == leave_out:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        array = weight.numpy()
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            for part, rows in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", rows.copy())
            continue
        name = name.replace("experts.down_proj", "experts.down_proj.weight")
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            array = array + 1
        for projection, count in heads.items():
            # GGUF's Llama rotates neighbours, transformers halves
            if projection in name and architecture == "llama":
                array = array.reshape(count, 2, -1, array.shape[-1]).swapaxes(1, 2)
                array = array.reshape(weight.shape)
        gguf_name = names.get_name(name, (".weight", ".bias"))
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        assert gguf_name is not None
        kind = weights if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name, gguf.quantize(array, kind).copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


_GGUF_WRITERS: dict[type, Any] = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    list: gguf.GGUFWriter.add_array,
    str: gguf.GGUFWriter.add_string,
}


def _add_gguf_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """As llama.cpp writes it: in metadata, or as factors of every pair of channels."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        rope = rope["full_attention"]
    if config.model_type != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "phi3":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            ratio = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(
                math.sqrt(1 + math.log(ratio) / math.log(original))
            )
            for kind in ("long", "short"):
                factors = np.array(rope[f"{kind}_factor"], np.float32)
                writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    elif rope["rope_type"] == "llama3":
        frequencies = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)[0]
        pairs = torch.arange(0, config.head_dim, 2) / config.head_dim
        divisors = rope["rope_theta"] ** -pairs / frequencies
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    elif rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_pieces(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Pieces with scores: special ones, bytes, letters, a word, and some that are not used."""
    tokens = ["<pad>", "<eos>", "<bos>", "<end_of_turn>"]
    types = [gguf.TokenType.CONTROL] * 4
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [gguf.TokenType.BYTE] * 256
    tokens += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "\u2581the"]
    types += [gguf.TokenType.NORMAL] * (len(tokens) - len(types))
    rest = range(len(tokens), vocab_size)
    tokens += [f"<unused{index}>" for index in rest]
    types += [gguf.TokenType.UNUSED] * len(rest)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(vocab_size)])
    writer.add_token_types(types)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_add_bos_token(True)
