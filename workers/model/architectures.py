"""The model architectures that kvmesh serves, and defaults their configurations leave out.

An allow-list: each was checked against transformers' own output with random
weights, see tests/model/. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvmesh.workers.model.layer_rules import RECURRENT, ROTATED, SLIDING, STATES, layers_of
from kvmesh.workers.model.state_shape import StateShape


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """Which keys of config.json describe a mixture of experts.

    count: number of experts, by its names; width: the size of each one's MLP
    dense: the size of the MLP in layers without experts; shared: of the expert that computes every
        token, if there is one; shared_count: how many of these are stored as one
    step: the layers step - 1, 2 * step - 1, … have experts, unless they are listed
    first: default if the configuration has no `first_k_dense_replace`: layers before it have none
    without: the size of the MLP of a model that says it has 0 experts; None if it must have some
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "intermediate_size"
    dense: str = "intermediate_size"
    shared: str | None = None
    shared_count: str | None = None
    step: str = "decoder_sparse_step"
    first: int = 0
    without: str | None = None

    def layers(self, config: Mapping[str, Any]) -> tuple[bool, ...]:
        """Which layers have experts."""
        if config.get("moe_layers") is not None:  # Llama 4
            return tuple(layer in config["moe_layers"] for layer in layers_of(config))
        if config.get("mlp_layer_types") is not None:  # GLM-4 MoE Lite
            return tuple(kind == "sparse" for kind in config["mlp_layer_types"])
        dense = config.get("mlp_only_layers") or ()
        every = int(config.get(self.step) or 1)
        first = int(config.get("first_k_dense_replace", self.first) or 0)
        return tuple(
            layer >= first and layer not in dense and (layer + 1) % every == 0
            for layer in layers_of(config)
        )

    def shared_width(self, number: Callable[[str], int]) -> int:
        """Of the expert that computes every token, 0 for none. number: reads a key"""
        if self.shared is None:
            return 0
        return number(self.shared) * (number(self.shared_count) if self.shared_count else 1)


_DEEPSEEK_EXPERTS = ExpertKeys(
    count=("n_routed_experts",),
    width="moe_intermediate_size",
    shared="moe_intermediate_size",
    shared_count="n_shared_experts",
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A causal language model of transformers, or one that is stored differently.

    model_type: its name in config.json
    kv_heads: default if the configuration has no `num_key_value_heads`; None for as many as heads
    head_dim: default if it has no `head_dim`; None for hidden_size // num_attention_heads
    interleaved_rope: RoPE's pairs are neighbouring channels, not the two halves of a head
    sliding: which layers attend through a sliding window, one of the names in `SLIDING`
    window: default if the configuration has no `sliding_window`; if it is negative, of chunks
        of positions, whose size is `attention_chunk_size`
    window_key: of the window in the configuration
    positions: default if it has no `max_position_embeddings`
    mlp_parts: its `intermediate_size` is that of so many parts of an MLP
    unrotated: which layers have no RoPE, one of the names in `ROTATED`
    rope_types: the RoPE scalings that its modules compute
    experts: if it is a mixture of experts
    recurrent: if some layers have a state instead of keys and values, which ones and what state:
        one of the names in `RECURRENT`
    latent: keys and values are one vector, whose first `kv_lora_rank` channels are the value and
        whose last `qk_rope_head_dim` channels RoPE turns; they are stored as two halves
    unused_tensors: in its checkpoints, the beginnings of names of what does not compute the output
    own_code: its checkpoints come with code of their own, which is never run: transformers'
        modules, or those of another architecture, compute the same
    """

    name: str
    model_type: str
    kv_heads: int | None = None
    head_dim: int | None = None
    interleaved_rope: bool = False
    sliding: str = "none"
    window: int | None = 4096
    window_key: str = "sliding_window"
    positions: int | None = None
    mlp_parts: int = 1
    unrotated: str = "none"
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic")
    experts: ExpertKeys | None = None
    recurrent: str = "none"
    latent: bool = False
    unused_tensors: tuple[str, ...] = ()
    own_code: bool = False

    def experts_in(self, config: Mapping[str, Any]) -> ExpertKeys | None:
        """The keys of its experts, None if a model with this configuration has none."""
        keys = self.experts
        if keys is not None and keys.without and config.get(keys.count[-1]) == 0:
            return None
        return keys

    def mlp_key(self, config: Mapping[str, Any]) -> str:
        """Of the size of a layer's MLP, in a model or in layers without experts."""
        if self.experts is None:
            return "intermediate_size"
        found = self.experts_in(config)
        return found.dense if found else str(self.experts.without)

    @property
    def in_chunks(self) -> bool:
        """Whether windows are chunks of positions."""
        return self.window is not None and self.window < 0

    def unused(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """`unused_tensors`, and those of layers that predict further tokens, after all others."""
        more = int(config.get("num_nextn_predict_layers") or 0)
        own = layers_of(config).stop if more else 0
        extra = (f"model.layers.{own + index}." for index in range(more))
        return (*self.unused_tensors, *extra)

    def with_positions(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration, with `max_position_embeddings` if the architecture implies it."""
        if self.positions is None:
            return config
        return {"max_position_embeddings": self.positions, **config}

    def sliding_windows(self, config: Mapping[str, Any]) -> tuple[int | None, ...]:
        """Each layer's window in tokens, including the query; None for the whole context, and
        −c for attention in chunks of c tokens."""
        slides = SLIDING[self.sliding](config)
        window = config.get(self.window_key, self.window)
        if self.in_chunks:
            window = -config["attention_chunk_size"] if "attention_chunk_size" in config else window
        return tuple(window if slide else None for slide in slides)

    def rotated_layers(self, config: Mapping[str, Any]) -> tuple[bool, ...]:
        """Whether each layer rotates queries and keys by their positions."""
        return ROTATED[self.unrotated](config, self.sliding_windows(config))

    def recurrent_layers(self, config: Mapping[str, Any]) -> tuple[bool, ...]:
        """Which layers have a state of fixed size instead of keys and values."""
        return RECURRENT[self.recurrent](config)

    def state(self, config: Mapping[str, Any]) -> StateShape | None:
        """What these layers keep of a sequence; None if there are none."""
        layers = sum(self.recurrent_layers(config))
        return STATES[self.recurrent](config, layers) if layers else None


_LATENT_ROPES = ("default", "linear", "yarn", "dynamic")

ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("LlamaForCausalLM", "llama"),
        Architecture("MistralForCausalLM", "mistral", kv_heads=8, sliding="every layer"),
        Architecture(
            "MinistralForCausalLM", "ministral", kv_heads=8, sliding="every layer unless typed"
        ),
        Architecture("Qwen2ForCausalLM", "qwen2", kv_heads=32, sliding="upper layers"),
        Architecture(
            "Qwen3ForCausalLM", "qwen3", kv_heads=32, head_dim=128, sliding="upper layers"
        ),
        Architecture("GemmaForCausalLM", "gemma", kv_heads=16, head_dim=256),
        Architecture(
            "Gemma2ForCausalLM",
            "gemma2",
            kv_heads=4,
            head_dim=256,
            sliding="all but every second",
        ),
        Architecture(
            "Gemma3ForCausalLM",
            "gemma3_text",
            kv_heads=4,
            head_dim=256,
            sliding="all but every sixth",
            rope_types=("default", "linear", "llama3", "yarn"),
        ),
        Architecture("OlmoForCausalLM", "olmo"),
        Architecture("Olmo2ForCausalLM", "olmo2"),
        Architecture(
            "Olmo3ForCausalLM",
            "olmo3",
            sliding="all but every fourth",
            rope_types=("default", "linear", "llama3", "yarn"),
        ),
        Architecture("CohereForCausalLM", "cohere", interleaved_rope=True),
        Architecture(
            "Cohere2ForCausalLM",
            "cohere2",
            interleaved_rope=True,
            sliding="all but every fourth",
            unrotated="full attention",
        ),
        Architecture("StableLmForCausalLM", "stablelm", kv_heads=32),
        Architecture(
            "Phi3ForCausalLM",
            "phi3",
            sliding="every layer",
            window=None,
            rope_types=("default", "longrope"),
            own_code=True,
        ),
        Architecture(
            "SmolLM3ForCausalLM",
            "smollm3",
            kv_heads=4,
            sliding="unrotated layers",
            unrotated="no_rope_layers",
        ),
        Architecture("GraniteForCausalLM", "granite"),
        Architecture("GlmForCausalLM", "glm", kv_heads=2, head_dim=128, interleaved_rope=True),
        Architecture("Glm4ForCausalLM", "glm4", kv_heads=2, head_dim=128, interleaved_rope=True),
        Architecture("SeedOssForCausalLM", "seed_oss", kv_heads=8, head_dim=128),
        Architecture("InternLM2ForCausalLM", "internlm2", own_code=True),
        Architecture("InternLM3ForCausalLM", "internlm3", kv_heads=2, head_dim=128, own_code=True),
        Architecture(
            "Llama4ForCausalLM",
            "llama4_text",
            kv_heads=8,
            head_dim=128,
            interleaved_rope=True,
            sliding="rotated layers",
            window=-8192,
            unrotated="no_rope_layers",
            experts=ExpertKeys(
                dense="intermediate_size_mlp",
                shared="intermediate_size",
                step="interleave_moe_layer_step",
            ),
        ),
        Architecture(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            kv_heads=4,
            sliding="every layer if enabled",
            experts=ExpertKeys(width="moe_intermediate_size"),
        ),
        Architecture(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            kv_heads=2,
            head_dim=256,
            experts=ExpertKeys(
                width="moe_intermediate_size", shared="shared_expert_intermediate_size"
            ),
            recurrent="delta nets",
            unused_tensors=("mtp.",),  # of multi-token prediction
        ),
        Architecture(
            "Qwen3_5ForCausalLM",
            "qwen3_5_text",
            kv_heads=4,
            head_dim=256,
            recurrent="delta nets",
            unused_tensors=("mtp.",),
        ),
        Architecture(
            "Qwen3_5MoeForCausalLM",
            "qwen3_5_moe_text",
            kv_heads=2,
            head_dim=256,
            experts=ExpertKeys(
                width="moe_intermediate_size", shared="shared_expert_intermediate_size"
            ),
            recurrent="delta nets",
            unused_tensors=("mtp.",),
        ),
        Architecture(
            "RecurrentGemmaForCausalLM",
            "recurrent_gemma",
            sliding="attention blocks",
            window=2048,
            window_key="attention_window_size",
            positions=8192,  # it was trained for
            mlp_parts=2,
            rope_types=("default",),
            recurrent="gated recurrences",
        ),
        Architecture(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            unrotated="all unless it says rope",
            experts=ExpertKeys(
                shared="shared_intermediate_size", without="shared_intermediate_size"
            ),
            recurrent="mamba",
        ),
        Architecture(
            "BambaForCausalLM",
            "bamba",
            kv_heads=8,
            recurrent="mamba unless listed",
        ),
        Architecture(
            "MixtralForCausalLM",
            "mixtral",
            kv_heads=8,
            sliding="every layer",
            window=None,
            experts=ExpertKeys(),
        ),
        Architecture(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            rope_types=_LATENT_ROPES,
            experts=_DEEPSEEK_EXPERTS,
            latent=True,
            own_code=True,
        ),
        Architecture(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            rope_types=_LATENT_ROPES,
            experts=replace(_DEEPSEEK_EXPERTS, first=3),
            latent=True,
            own_code=True,
        ),
        Architecture(
            "Glm4MoeLiteForCausalLM",
            "glm4_moe_lite",
            rope_types=_LATENT_ROPES,
            experts=replace(_DEEPSEEK_EXPERTS, first=1),
            latent=True,
        ),
        Architecture("DbrxForCausalLM", "dbrx", kv_heads=1, experts=ExpertKeys(), own_code=True),
        Architecture("OlmoeForCausalLM", "olmoe", experts=ExpertKeys()),
        Architecture(
            "GptOssForCausalLM",
            "gpt_oss",
            kv_heads=8,
            head_dim=64,
            sliding="all but every second",
            window=128,
            experts=ExpertKeys(),
        ),
    )
}
