"""Builds a rank's model: transformers' modules, kvmesh's attention, this rank's weights.

The model is built on the meta device, which uses no memory, and filled from
safetensors slice by slice, so that a rank never holds more than its share.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kvmesh.kernels.formats.rotation import rotation_matrix
from kvmesh.kernels.linear import PackedWeight, move_to_large_pages
from kvmesh.workers.config import WeightFormatName
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.architectures import ARCHITECTURES
from kvmesh.workers.model.blocks import FusedAttention, FusedLayer, fuse, fused_layer, lean_norm
from kvmesh.workers.model.delta_net import GatedDeltaNet
from kvmesh.workers.model.facts import ModelFacts, read_facts, read_json
from kvmesh.workers.model.hook import IMPLEMENTATION, Attend, AttendSlot, Entry, attach
from kvmesh.workers.model.layer_stack import stacked
from kvmesh.workers.model.mamba2 import Mamba2Mixer
from kvmesh.workers.model.placer import Placer
from kvmesh.workers.model.recurrent_state import StepStates
from kvmesh.workers.model.rg_lru import GatedLinearRecurrence
from kvmesh.workers.model.rope import Rope, fixed_rotary, override_rope
from kvmesh.workers.model.shard_plans import shard_of
from kvmesh.workers.model.sizes import check_tp
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.model.storage import Storage
from kvmesh.workers.model.stored import adapt, read_config, stored_as
from kvmesh.workers.model.weights import WeightReader, Weights
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.experts import Experts, RowByRow
from kvmesh.workers.parallel.linears import ColumnLinear, RowLinear, VocabHead
from kvmesh.workers.rope_override import RopeOverride
from kvmesh.workers.sizes import kv_heads_of_rank

logger = logging.getLogger(__name__)


class ServedModel:
    """One rank's share of a model, ready to run.

    num_heads, num_kv_heads: of this rank; facts: of the whole model
    rotary_emb: cosines and sines of positions; ropes: each layer's frequencies
    values_rotated: whether `attend` gets values in the basis of `kernels/formats/rotation.py`, and
        has to return its output in it
    rotary_emb: cosines and sines of positions; ropes: the frequencies of each layer with keys
    state: what recurrent layers keep of a sequence, on this rank
    """

    def __init__(
        self,
        facts: ModelFacts,
        model: Any,
        slot: AttendSlot,
        comm: Communicator,
        dtype: torch.dtype,
    ) -> None:
        self.values_rotated = False
        self.facts = facts
        self.num_heads = facts.num_heads // comm.tp
        self.num_kv_heads = kv_heads_of_rank(facts.num_kv_heads, comm.tp)
        self.head_dim = facts.head_dim
        ropes = Rope.of_layers(
            model.model.rotary_emb,
            model.config,
            facts.rotated_layers or (True,) * facts.num_layers,
            interleaved=ARCHITECTURES[facts.architecture].interleaved_rope,
        )
        recurrent = facts.recurrent_layers or (False,) * facts.num_layers
        self.ropes = tuple(rope for rope, state in zip(ropes, recurrent, strict=True) if not state)
        self.state = None if facts.state is None else facts.state.of_rank(comm.size)
        self.rotary_emb: nn.Module = model.model.rotary_emb
        self._dtype = dtype
        self._body: nn.Module = model.model
        self._head: VocabHead = model.lm_head
        self._slot = slot
        self._logit_scale: float | None = getattr(model, "logit_scale", None)
        self._logit_divisor: float | None = getattr(model.config, "logits_scaling", None)
        caps = ("final_logit_softcapping", "logits_soft_cap")
        self._logit_softcap: float | None = next(
            (getattr(model.config, name) for name in caps if hasattr(model.config, name)), None
        )

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        logits_rows: Tensor,
        states: StepStates | None = None,
    ) -> Tensor | None:
        """Logits of the tokens `logits_rows` of a step, on rank 0; None on the other ranks.

        input_ids, positions: [T] int64, the tokens of any number of sequences, without padding
        attend: called once per layer with keys; knows which token belongs to which sequence
        logits_rows: [n] int64, from 0 to T - 1
        Returns [n, vocab_size] fp32. Nothing synchronises with the host and no shape
        depends on data, so a call can be captured in a CUDA graph.
        """
        return self.logits(self.hidden(input_ids, positions, attend, states), logits_rows)

    def forward_with_grad(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, logits_rows: Tensor
    ) -> Tensor | None:
        """`forward`, differentiable if `attend` returns tensors that require gradients."""
        return self.logits(self.hidden(input_ids, positions, attend), logits_rows)

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        states: StepStates | None = None,
        entry: Entry = Entry.PLAIN,
    ) -> Tensor:
        """The tokens' last hidden states, [T, hidden_size]; see `forward`.

        states: of the sequences; without them, the tokens are one sequence from its beginning
        entry: what `attend` takes
        """
        if self.state is not None and states is None:
            states = StepStates.of_one(self.state, len(input_ids), self._dtype, input_ids.device)
        with self._slot.holding(attend, positions, states, entry):
            found: Tensor = self._body(
                input_ids=input_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
            ).last_hidden_state
        return found[0]

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor | None:
        """[n, vocab_size] fp32 of the `rows` of `hidden`, on rank 0; None on the other ranks.

        Every rank must call it with the same number of rows.
        """
        logits = self._head(hidden.index_select(0, rows))
        return None if logits is None else self._finish(logits)

    def rotate_values(self, rotated: bool) -> bool:
        """Fold the rotation of values into the weights, or take it out; False if that cannot be
        done in some layer, and nothing has changed."""
        if rotated == self.values_rotated:
            return True
        attentions = [part for part in self._body.modules() if isinstance(part, FusedAttention)]
        if len(attentions) != self.facts.num_layers or not all(a.folds_values for a in attentions):
            return False
        matrix = rotation_matrix(self.head_dim)
        matrix = matrix if rotated else matrix.T
        for attention in attentions:
            attention.rotate_values(matrix.to(attention.o_proj.weight.device))
        self.values_rotated = rotated
        return True

    def make_deterministic(self) -> None:
        """From now on a token's hidden states and logits have the same bits in any step, if its
        attention has. Raises ConfigError naming `deterministic` for models with other products,
        or other sums, than those of which that is known."""
        if self.state is not None:
            raise ConfigError(
                "deterministic", "must be false for models with recurrent layers, which scan chunks"
            )
        model_type = self._body.config.model_type  # type: ignore[union-attr]
        if self.facts.num_experts and model_type not in _DETERMINISTIC_MIXTURES:
            raise ConfigError(
                "deterministic",
                "among mixtures of experts is for Mixtral, OLMoE and Qwen3-MoE; got "
                f"{self.facts.architecture}",
            )
        parts = list(self._body.modules())
        if any(isinstance(part, nn.Linear) for part in parts):
            raise ConfigError(
                "deterministic",
                f"must be false for {self.facts.architecture}: it has other linears",
            )
        linears = [part for part in parts if isinstance(part, ColumnLinear | RowLinear)]
        weights = [part.weight for part in (*linears, self._head)]
        if weights[0].device.type == "cpu":
            if not all(isinstance(weight, PackedWeight) for weight in weights):
                raise ConfigError("deterministic", "needs dtype float32 on CPUs")
        else:
            layers = [type(part).__name__ for part in self._body.layers]  # type: ignore[union-attr]
            if set(layers) != {FusedLayer.__name__}:
                raise ConfigError(
                    "deterministic",
                    "on GPUs is for Llama, Mistral, Qwen2 and Qwen3, whose operators between "
                    f"products are kvmesh's own; got {self.facts.architecture}",
                )
        for part in (*linears, self._head):
            part.deterministic = True
        for name, part in list(self._body.named_modules()):
            if isinstance(part, Experts):
                part.make_deterministic()
            elif shard_of(str(model_type), name) == "router":
                self._body.set_submodule(name, RowByRow(part))

    def expert_tokens(self) -> Tensor | None:
        """[layers with experts, num_experts] int64 on the host: how many tokens each expert has
        computed since the model was loaded, on all ranks. None if the model has no experts."""
        experts = (part for part in self._body.modules() if isinstance(part, Experts))
        loads: list[Tensor] = [part.load for part in experts]
        return torch.stack(loads).cpu() if loads else None

    def _finish(self, logits: Tensor) -> Tensor:
        """Scale and cap logits the way the architecture's own forward does."""
        if self._logit_scale is not None:
            logits = logits * self._logit_scale
        if self._logit_divisor is not None:
            logits = logits / self._logit_divisor
        if self._logit_softcap is not None:
            logits = torch.tanh(logits / self._logit_softcap) * self._logit_softcap
        return logits.float()


def load_model(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    comm: Communicator,
    rope: RopeOverride | None = None,
    max_model_len: int | None = None,
    expert_parallel: bool = False,
    weight_format: WeightFormatName = "exact",
) -> ServedModel:
    """This rank's share of the model in directory `path`.

    dtype: of weights and activations, for any dtype of the checkpoint
    rope: replaces the scaling in its configuration
    max_model_len: tokens of the longest sequence; by default the model's limit
    expert_parallel: ranks have whole experts instead of parts of all
    weight_format: how the weights of linears and experts are stored
    Raises ConfigError naming `tp` or `model`, UnsupportedModelError for a
    model that would be computed incorrectly.
    """
    facts = read_facts(path, rope)
    check_tp(facts, comm.tp, comm.kvp, expert_parallel=expert_parallel)
    config = read_config(facts, path)
    if rope is not None:
        override_rope(config, rope, facts.trained_len)
    _check_agreement(facts, config, path)
    if facts.text_of and comm.rank == 0:
        logger.info(
            "%s is a %s: text only; its %s is served, and weights for anything else are not read",
            facts.name,
            facts.text_of,
            facts.architecture,
        )
    keys = standard_keys(read_json(path / "config.json"), path)
    unused = ARCHITECTURES[facts.architecture].unused(keys)
    keeps_bits = Storage.of(weight_format, dtype, device).keeps_bits
    with WeightReader(path, dtype, device, unused, keeps_bits=keeps_bits) as reader:
        return build_model(
            facts,
            config,
            stored_as(facts, reader, path),
            dtype=dtype,
            device=device,
            comm=comm,
            max_model_len=max_model_len,
            expert_parallel=expert_parallel,
            weight_format=weight_format,
        )


def build_model(
    facts: ModelFacts,
    config: Any,
    weights: Weights,
    *,
    dtype: torch.dtype,
    device: torch.device,
    comm: Communicator,
    max_model_len: int | None = None,
    expert_parallel: bool = False,
    weight_format: WeightFormatName = "exact",
) -> ServedModel:
    """This rank's share of the model that a transformers `config` describes.

    weights: on `device` and of `dtype`, from a checkpoint or any other source
    max_model_len: tokens of the longest sequence; by default the model's limit
    expert_parallel: ranks have whole experts instead of parts of all
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=IMPLEMENTATION
        )
    adapt(facts, model)
    model.eval().requires_grad_(False)
    storage = Storage.of(weight_format, dtype, device)
    Placer(model, weights, comm, facts, storage, expert_parallel=expert_parallel).place()
    _restore_buffers(model, config, device, max_model_len or facts.max_model_len)
    slot = AttendSlot()
    recurrent = facts.recurrent_layers or (False,) * facts.num_layers
    for index, layer in enumerate(model.model.layers):
        # Layers with keys, and layers with states, are counted each for themselves.
        before = sum(recurrent[:index])
        name = next(name for name in _MIXERS if getattr(layer, name, None) is not None)
        mixer = getattr(layer, name)
        if name == "linear_attn":
            layer.linear_attn = GatedDeltaNet(mixer, before, slot, comm.size)
        elif name == "mamba":
            layer.mamba = Mamba2Mixer(mixer, before, slot, comm)
        elif recurrent[index]:
            layer.temporal_block = GatedLinearRecurrence(mixer, before, slot)
        else:
            mixer.layer_idx = index - before
            if name == "temporal_block":
                mixer.rotary_emb = model.model.rotary_emb
            _localise(mixer, comm)
            attach(mixer, slot)
        fuse(layer, facts.sliding_windows[index], slot, comm)
    move_to_large_pages(_packed(model))
    model.model.layers = stacked(map(fused_layer, model.model.layers), slot)
    norm = next(name for name in _LAST_NORMS if hasattr(model.model, name))
    setattr(model.model, norm, lean_norm(getattr(model.model, norm)))
    _check_complete(model, facts.name)
    return ServedModel(facts, model, slot, comm, dtype)


# Between their products are elementwise operators and kvmesh's own.
_DETERMINISTIC_MIXTURES = frozenset({"mixtral", "olmoe", "qwen3_moe"})
# What a layer mixes tokens with, by the names that transformers has for it.
_MIXERS = ("self_attn", "linear_attn", "temporal_block", "mamba")
_LAST_NORMS = ("norm", "final_norm", "final_layernorm")


def _check_agreement(facts: ModelFacts, config: Any, path: Path) -> None:
    """Check that `facts`, used by the control plane, agree with `config`, used by the model."""
    num_kv_heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    if facts.values_in_keys:  # head_dim is that of the channels that RoPE turns
        num_kv_heads, head_dim = 1, config.kv_lora_rank + head_dim
    pairs = {
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": config.vocab_size,
        "sliding_windows": _sliding_windows(config),
    }
    for name, theirs in pairs.items():
        if getattr(facts, name) != theirs:
            raise UnsupportedModelError(
                "model",
                f"{path / 'config.json'}: kvmesh reads {name} as {getattr(facts, name)},"
                f" but transformers reads it as {theirs}",
            )


# One window for all layers, if any, whatever the layer types.
_ONE_WINDOW = ("mistral", "mixtral", "phi3", "qwen3_moe")


def _sliding_windows(config: Any) -> tuple[int | None, ...]:
    kinds = getattr(config, "layer_types", None)
    if config.model_type in _ONE_WINDOW:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    kinds = kinds or ["full_attention"] * config.num_hidden_layers
    window = {"sliding_attention": getattr(config, "sliding_window", None)}
    if "chunked_attention" in kinds:
        window["chunked_attention"] = -config.attention_chunk_size
    return tuple(window.get(kind) for kind in kinds)


def _restore_buffers(model: Any, config: Any, device: torch.device, max_model_len: int) -> None:
    """Compute what no checkpoint contains: RoPE's frequencies, Gemma's embedding scale."""
    body = model.model
    body.rotary_emb = fixed_rotary(body.rotary_emb, config, device, max_model_len)
    factor = getattr(body.embed_tokens, "scalar_embed_scale", None)
    if factor is not None:
        body.embed_tokens.embed_scale = torch.tensor(factor, device=device)
    if hasattr(body, "normalizer"):  # RecurrentGemma, which rounds it
        scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16, device=device)
        body.normalizer = scale


def _localise(attention: Any, comm: Communicator) -> None:
    """StableLM stores its head counts and has one norm per head: keep this rank's."""
    for name in ("num_heads", "num_key_value_heads"):
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) // comm.tp)
    for name in ("q_layernorm", "k_layernorm"):
        norm = getattr(attention, name, None)
        if norm is not None:
            count = len(norm.norms) // comm.tp
            norm.norms = norm.norms[comm.tp_rank * count : (comm.tp_rank + 1) * count]


def _packed(model: nn.Module) -> list[PackedWeight]:
    """In the order in which a step reads them."""
    weights = (getattr(part, "weight", None) for part in model.modules())
    return [weight for weight in weights if isinstance(weight, PackedWeight)]


def _check_complete(model: nn.Module, name_of_model: str) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                "model", f"{name_of_model}: {name} was not loaded from the checkpoint"
            )
