"""Builds a rank's model: transformers' modules, kvmesh's attention, this rank's weights.

The model is built on the meta device, which uses no memory, and filled from
safetensors slice by slice, so that a rank never holds more than its share.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kvmesh.kernels.linear import WeightFormat, pack
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.architectures import ARCHITECTURES
from kvmesh.workers.model.blocks import fuse, fused_layer, lean_norm
from kvmesh.workers.model.facts import ModelFacts, read_facts
from kvmesh.workers.model.hook import IMPLEMENTATION, Attend, AttendSlot, attach
from kvmesh.workers.model.rope import Rope, fixed_rotary, override_rope
from kvmesh.workers.model.shards import Pack, Placer, check_tp
from kvmesh.workers.model.stored import adapt, read_config, stored_as
from kvmesh.workers.model.weights import WeightReader, Weights
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.experts import Experts
from kvmesh.workers.parallel.linears import VocabHead
from kvmesh.workers.rope_override import RopeOverride


class ServedModel:
    """One rank's share of a model, ready to run.

    num_heads, num_kv_heads: of this rank; facts: of the whole model
    rotary_emb: cosines and sines of positions; ropes: each layer's frequencies
    """

    def __init__(self, facts: ModelFacts, model: Any, slot: AttendSlot, tp: int) -> None:
        self.facts = facts
        self.num_heads = facts.num_heads // tp
        self.num_kv_heads = facts.num_kv_heads // tp
        self.head_dim = facts.head_dim
        self.ropes = Rope.of_layers(
            model.model.rotary_emb,
            model.config,
            facts.rotated_layers or (True,) * facts.num_layers,
            interleaved=ARCHITECTURES[facts.architecture].interleaved_rope,
        )
        self.rotary_emb: nn.Module = model.model.rotary_emb
        self._body: nn.Module = model.model
        self._head: VocabHead = model.lm_head
        self._slot = slot
        self._logit_scale: float | None = getattr(model, "logit_scale", None)
        self._logit_divisor: float | None = getattr(model.config, "logits_scaling", None)
        self._logit_softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, logits_rows: Tensor
    ) -> Tensor | None:
        """Logits of the tokens `logits_rows` of a step, on rank 0; None on the other ranks.

        input_ids, positions: [T] int64, the tokens of any number of sequences, without padding
        attend: called once per layer; knows which token belongs to which sequence
        logits_rows: [n] int64, from 0 to T - 1
        Returns [n, vocab_size] fp32. Nothing synchronises with the host and no shape
        depends on data, so a call can be captured in a CUDA graph.
        """
        return self.forward_with_grad(input_ids, positions, attend, logits_rows)

    def forward_with_grad(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, logits_rows: Tensor
    ) -> Tensor | None:
        """`forward`, differentiable if `attend` returns tensors that require gradients."""
        return self.logits(self.hidden(input_ids, positions, attend), logits_rows)

    def hidden(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, *, rotates: bool = False
    ) -> Tensor:
        """The tokens' last hidden states, [T, hidden_size]; see `forward`.

        rotates: see `AttendSlot.holding`
        """
        with self._slot.holding(attend, rotates=rotates):
            states: Tensor = self._body(
                input_ids=input_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
            ).last_hidden_state
        return states[0]

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor | None:
        """[n, vocab_size] fp32 of the `rows` of `hidden`, on rank 0; None on the other ranks.

        Every rank must call it with the same number of rows.
        """
        logits = self._head(hidden.index_select(0, rows))
        return None if logits is None else self._finish(logits)

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
    weight_format: WeightFormat = "exact",
) -> ServedModel:
    """This rank's share of the model in directory `path`.

    dtype: of weights and activations, for any dtype of the checkpoint
    rope: replaces the scaling in its configuration
    max_model_len: tokens of the longest sequence; by default the model's limit
    expert_parallel: ranks have whole experts instead of parts of all
    weight_format: how the weights of linears are stored
    Raises ConfigError naming `tp` or `model`, UnsupportedModelError for a
    model that would be computed incorrectly.
    """
    facts = read_facts(path, rope)
    check_tp(facts, comm.tp, comm.kvp, expert_parallel=expert_parallel)
    config = read_config(facts, path)
    if rope is not None:
        override_rope(config, rope, facts.trained_len)
    with WeightReader(path, dtype, device) as reader:
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
    weight_format: WeightFormat = "exact",
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
    packing = _packing(weight_format, dtype, device)
    Placer(model, weights, comm, facts, packing, expert_parallel=expert_parallel).place()
    _restore_buffers(model, config, device, max_model_len or facts.max_model_len)
    slot = AttendSlot()
    for layer, window in zip(model.model.layers, facts.sliding_windows, strict=True):
        _localise(layer.self_attn, comm)
        attach(layer.self_attn, slot)
        fuse(layer, window, slot)
    model.model.layers = nn.ModuleList(fused_layer(layer) for layer in model.model.layers)
    model.model.norm = lean_norm(model.model.norm)
    _check_complete(model, facts.name)
    return ServedModel(facts, model, slot, comm.tp)


def _packing(weight_format: WeightFormat, dtype: torch.dtype, device: torch.device) -> Pack:
    """Weights are packed for the compiled loops of CPUs, which compute in fp32."""
    if device.type == "cpu" and dtype == torch.float32:
        return partial(pack, weight_format=weight_format)
    if weight_format == "exact":
        return lambda weight: weight
    raise ConfigError(
        "weight_format",
        f"{weight_format} needs a CPU and float32, got {device.type} and"
        f" {str(dtype).removeprefix('torch.')}; use exact",
    )


def _check_agreement(facts: ModelFacts, config: Any, path: Path) -> None:
    """Check that `facts`, used by the control plane, agree with `config`, used by the model."""
    pairs = {
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
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
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _restore_buffers(model: Any, config: Any, device: torch.device, max_model_len: int) -> None:
    """Compute what no checkpoint contains: RoPE's frequencies, Gemma's embedding scale."""
    body = model.model
    body.rotary_emb = fixed_rotary(body.rotary_emb, config, device, max_model_len)
    factor = getattr(body.embed_tokens, "scalar_embed_scale", None)
    if factor is not None:
        body.embed_tokens.embed_scale = torch.tensor(factor, device=device)


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


def _check_complete(model: nn.Module, name_of_model: str) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                "model", f"{name_of_model}: {name} was not loaded from the checkpoint"
            )
