"""Faster versions of the blocks of decoder layers, for architectures that they match exactly.

A decode step of a small model spends as much time between its matrix products as in
them. Hence one product for queries, keys and values, one for gate and up, and RoPE over
queries and keys together. Each table below lists the transformers classes that compute
exactly this; any other class runs unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvmesh.kernels import gpu
from kvmesh.kernels.cpu import has_loops
from kvmesh.kernels.layer import AttentionInput, FeedForward, RunLayer
from kvmesh.kernels.linear import PackedWeight
from kvmesh.kernels.pointwise import add_rms_norm, rms_norm, silu_mul
from kvmesh.kernels.pointwise.reference import rotate
from kvmesh.workers.model.gated_attention import GatedAttention
from kvmesh.workers.model.hook import AttendArgs, AttendSlot, Entry, WrittenAttend
from kvmesh.workers.model.latent_attention import LATENT_ATTENTION, LatentAttention
from kvmesh.workers.model.llama4 import Llama4Attention, Llama4Mixture
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.experts import Experts
from kvmesh.workers.parallel.linears import ColumnLinear

# Projections, then RoPE on halves, then attention; with nothing else in between except the norm
# per head (q_norm, k_norm), the clamp (clip_qkv) and layers without RoPE (use_rope), which
# FusedAttention handles.
_PLAIN_ATTENTION = frozenset(
    {
        "LlamaAttention",
        "MistralAttention",
        "MinistralAttention",
        "MixtralAttention",
        "Qwen2Attention",
        "Qwen3Attention",
        "Qwen3MoeAttention",
        "GemmaAttention",
        "Gemma2Attention",
        "Gemma3Attention",
        "BambaAttention",
        "GraniteAttention",
        "GraniteMoeHybridAttention",
        "OlmoAttention",
        "Phi3Attention",
        "SeedOssAttention",
        "SmolLM3Attention",
    }
)
# Attention whose output is gated.
_GATED_ATTENTION = frozenset({"Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention"})
# hidden + attention(norm(hidden)), then that + mlp(norm(that))
_PLAIN_LAYER = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
# x / rms(x) * weight
_PLAIN_RMS_NORM = frozenset(
    {
        f"{family}RMSNorm"
        for family in (
            "Llama",
            "Llama4Text",
            "Mistral",
            "Ministral",
            "Mixtral",
            "Qwen2",
            "Qwen3",
            "Qwen3Moe",
            "Olmo2",
            "Olmo3",
            "Olmoe",
            "Phi3",
            "SmolLM3",
            "Bamba",
            "Granite",
            "GraniteMoeHybrid",
            "Glm",
            "Glm4",
            "SeedOss",
            "GptOss",
            "DeepseekV2",
            "DeepseekV3",
            "Glm4MoeLite",
        )
    }
)
# x / rms(x) * (1 + weight), with the sum in float32
_CENTRED_RMS_NORM = frozenset(
    {
        "GemmaRMSNorm",
        "Gemma2RMSNorm",
        "Gemma3RMSNorm",
        "Qwen3NextRMSNorm",
        "Qwen3_5MoeRMSNorm",
        "Qwen3_5RMSNorm",
        "RecurrentGemmaRMSNorm",
    }
)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 and rounded once."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._shape = tuple(weight.shape)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if has_loops(x):
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self._shape, self.weight, self.eps)


class FusedAttention(nn.Module):
    """Self-attention from hidden states to hidden states.

    qkv: from hidden size to (num_heads + 2 * num_kv_heads) * head_dim, for this rank
    q_norm, k_norm: over each head's dimensions, or None
    """

    def __init__(self, source: Any, sliding_window: int | None, slot: AttendSlot) -> None:
        super().__init__()
        self._head_dim: int = source.head_dim
        if hasattr(source, "qkv_proj"):
            self.qkv: ColumnLinear = source.qkv_proj
            group: int = source.num_key_value_groups
            num_kv = self.qkv.weight.shape[0] // (self._head_dim * (group + 2))
            self._heads = [group * num_kv, num_kv, num_kv]
        else:
            projections = [source.q_proj, source.k_proj, source.v_proj]
            self._heads = [part.weight.shape[0] // self._head_dim for part in projections]
            self.qkv = ColumnLinear.joined(projections)
        self.o_proj = source.o_proj
        self.q_norm = getattr(source, "q_norm", None)
        self.k_norm = getattr(source, "k_norm", None)
        self._clip: float | None = getattr(source.config, "clip_qkv", None)
        self._rotates = bool(getattr(source, "use_rope", True))
        self._layer: int = source.layer_idx
        self._slot = slot
        self._args = AttendArgs(
            scale=source.scaling,
            softcap=getattr(source, "attn_logit_softcapping", None),
            sliding_window=sliding_window,
        )

    @property
    def args(self) -> AttendArgs:
        return self._args

    @property
    def layer(self) -> int:
        """Its number among those that have pages."""
        return self._layer

    @property
    def folds_values(self) -> bool:
        """Whether nothing but the projections sees values, and their weights are plain tensors, of
        whole heads: kvp ranks may each have a part of one."""
        weights = (self.qkv.weight, self.o_proj.weight)
        plain = all(isinstance(weight, nn.Parameter) for weight in weights)
        return self._clip is None and plain and self.o_proj.weight.shape[1] % self._head_dim == 0

    def rotate_values(self, matrix: Tensor) -> None:
        """Fold a rotation into the weights: values become v @ matrix.T, and the output projection
        takes heads in that basis. matrix: [head_dim, head_dim] fp32, orthonormal"""
        assert isinstance(self.qkv.weight, nn.Parameter), "folds_values says so"
        dim = self._head_dim
        first = (self._heads[0] + self._heads[1]) * dim
        to_values = self.qkv.weight.data[first:].view(-1, dim, self.qkv.weight.shape[1])
        for head in to_values:
            head.copy_(matrix @ head.float())
        if self.qkv.bias is not None:
            bias = self.qkv.bias.data[first:].view(-1, dim)
            bias.copy_(bias.float() @ matrix.T)
        from_values = self.o_proj.weight.data.unflatten(1, (-1, dim))
        for index in range(from_values.shape[1]):
            head = from_values[:, index]
            head.copy_(head.float() @ matrix.T)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden] -> ([1, T, hidden], None), as the decoder layer expects"""
        return self.o_proj(self.heads(hidden_states[0], position_embeddings)).unsqueeze(0), None

    def heads(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Attention before its output projection: [T, hidden] -> [T, num_heads * head_dim]"""
        attend = self._slot.attend
        assert attend is not None, "attention was called outside ServedModel.forward"
        qkv = self.qkv(hidden)
        if self._clip is not None:
            qkv = qkv.clamp_(-self._clip, self._clip)
        num_q, num_k, _ = self._heads
        qkv = qkv.view(qkv.shape[0], -1, self._head_dim)
        qk = qkv[:, : num_q + num_k]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :num_q]), self.k_norm(qk[:, num_q:])), dim=1)
        args = self._args
        if self._rotates:
            cos, sin = position_embeddings[0][0], position_embeddings[1][0]
            if self._slot.entry >= Entry.ROPE and cos.shape[-1] == self._head_dim:
                args = replace(args, rope=(cos, sin))
            else:
                qk = rotate(qk, cos, sin)
        out = attend(self._layer, qk[:, :num_q], qk[:, num_q:], qkv[:, num_q + num_k :], args)
        return out.reshape(out.shape[0], -1)

    def input_after(self, norm: RMSNorm) -> AttentionInput | None:
        """All from this norm up to attention in one call, where packed weights and no other
        operators are between."""
        plain = self._clip is None and self.q_norm is None and self.k_norm is None
        weight = self.qkv.weight
        if not (plain and self._rotates and isinstance(weight, PackedWeight)):
            return None
        if weight.in_features % AttentionInput.MULTIPLE:
            return None
        bias = None if self.qkv.bias is None else self.qkv.bias.data
        num_q, num_k, _ = self._heads
        return AttentionInput(
            norm.weight.data, norm.eps, weight, bias, num_q, num_k, self._head_dim
        )

    def written(
        self, inputs: AttentionInput, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """`heads` of the normalised `hidden`, in the fewest calls; None if this step's `attend`
        or RoPE needs them apart."""
        cos, sin = position_embeddings
        if self._slot.entry < Entry.WRITTEN or cos.shape[-1] != self._head_dim:
            return None
        attend = cast("WrittenAttend", self._slot.attend)
        q = inputs(hidden, cos[0], sin[0], *attend.target(self._layer))
        out = attend.read(self._layer, q, self._args)
        return out.view(out.shape[0], -1)


class FusedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))"""

    def __init__(self, source: Any) -> None:
        super().__init__()
        if hasattr(source, "gate_up_proj"):
            self.gate_up: ColumnLinear = source.gate_up_proj
        else:
            self.gate_up = ColumnLinear.joined([source.gate_proj, source.up_proj])
        has_name = hasattr(source, "activation_fn")
        self.activation = source.activation_fn if has_name else source.act_fn
        self.down_proj = source.down_proj
        self._width = self.gate_up.weight.shape[0] // 2

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden] -> like x"""
        return self.down_proj(self.activated(self.gate_up(x)))  # type: ignore[no-any-return]

    def activated(self, both: Tensor) -> Tensor:
        """Gate and up, [..., 2 * width] -> [..., width]"""
        gate, up = both[..., : self._width], both[..., self._width :]
        return self.activation(gate) * up  # type: ignore[no-any-return]


class FusedLayer(nn.Module):
    """A decoder layer in inference: ten launches of a GPU in decode, of which five are products.

    Each residual is added by the product before it or, on CPUs and on several ranks, by the norm
    after it.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.plain = source
        self._activates = type(source.mlp.activation).__name__ in ("SiLUActivation", "SiLU")
        self._before = source.self_attn.input_after(source.input_layernorm)
        self._after = _feed_forward(source) if self._activates else None

    @property
    def in_run(self) -> RunLayer | None:
        """The layer as part of a `LayerRun`, if nothing of it needs other operators."""
        if self._before is None or self._after is None:
            return None
        attention = self.plain.self_attn
        args = attention.args
        return RunLayer(
            *(self._before, self._after, attention.layer),
            *(args.scale, args.softcap, args.sliding_window),
        )

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Tensor:
        """[1, T, hidden] -> [1, T, hidden], in the same memory"""
        if not torch.is_inference_mode_enabled():  # gradients are wanted
            kwargs["position_embeddings"] = position_embeddings
            return self.plain(hidden_states, **kwargs)  # type: ignore[no-any-return]
        layer, residual = self.plain, hidden_states[0]
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        heads = None
        if self._before is not None:
            heads = layer.self_attn.written(self._before, residual, position_embeddings)
        if heads is None:
            x = rms_norm(residual, before.weight, before.eps)
            heads = layer.self_attn.heads(x, position_embeddings)
        if self._after is not None:
            self._after(heads, residual)
            return hidden_states
        x = layer.self_attn.o_proj.onto(heads, residual)
        if x is None:
            x = rms_norm(residual, after.weight, after.eps)
        else:
            x = add_rms_norm(x, residual, after.weight, after.eps)
        both = layer.mlp.gate_up(x)
        x = silu_mul(both) if self._activates else layer.mlp.activated(both)
        x = layer.mlp.down_proj.onto(x, residual)
        if x is not None:
            residual += x
        return hidden_states


def _feed_forward(layer: Any) -> FeedForward | None:
    """All after attention in one call, if this rank has whole, packed weights and no biases."""
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    linears = (layer.self_attn.o_proj, mlp.gate_up, mlp.down_proj)
    o_proj, gate_up, down = (linear.weight for linear in linears)
    sizes = (down.shape[0], down.shape[1], o_proj.shape[1])
    if (
        not all(
            isinstance(linear.weight, PackedWeight) and linear.bias is None for linear in linears
        )
        or mlp.down_proj.is_split
        or any(size % FeedForward.MULTIPLE for size in sizes)
    ):
        return None
    return FeedForward(o_proj, norm.weight, norm.eps, gate_up, down)


def fuses(x: Tensor) -> bool:
    """Whether the operators between products are one launch, or one loop, for tensors like x."""
    return gpu.runs_kernels(x) or has_loops(x)


def fused_layer(layer: Any) -> nn.Module:
    """The layer, after `fuse`, as it runs on its device."""
    fits = (
        type(layer).__name__ in _PLAIN_LAYER
        and isinstance(layer.self_attn, FusedAttention)
        and isinstance(layer.input_layernorm, RMSNorm)
        and isinstance(layer.post_attention_layernorm, RMSNorm)
        and fuses(layer.input_layernorm.weight)
    )
    return FusedLayer(layer) if fits else layer


def fuse(layer: Any, sliding_window: int | None, slot: AttendSlot, comm: Communicator) -> None:
    """Replace the blocks of a decoder layer where the tables allow it, reusing its weights."""
    for name, module in list(layer.named_modules()):
        parent, _, child = name.rpartition(".")
        lean = _lean_norm(module)
        if lean is not None:
            setattr(layer.get_submodule(parent), child, lean)
        if hasattr(module, "down_proj") and not isinstance(module, Experts):
            setattr(layer.get_submodule(parent), child, FusedMLP(module))
    kind = type(getattr(layer, "self_attn", None)).__name__
    if kind in _PLAIN_ATTENTION:
        layer.self_attn = FusedAttention(layer.self_attn, sliding_window, slot)
    elif kind in LATENT_ATTENTION:
        layer.self_attn = LatentAttention(layer.self_attn, slot, comm)
    elif kind in _GATED_ATTENTION:
        layer.self_attn = GatedAttention(layer.self_attn, sliding_window, slot, comm)
    elif kind == "Llama4TextAttention":
        layer.self_attn = Llama4Attention(layer.self_attn, sliding_window, slot)
        if layer.is_moe_layer:
            layer.feed_forward = Llama4Mixture(layer.feed_forward)


def lean_norm(module: nn.Module) -> nn.Module:
    """The faster version of a norm if there is one, otherwise the norm itself."""
    return _lean_norm(module) or module


def _lean_norm(module: Any) -> nn.Module | None:
    kind = type(module).__name__
    if kind in _PLAIN_RMS_NORM:
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        return RMSNorm(module.weight.data, epsilon)
    # In bfloat16, 1 + weight would be rounded before the multiplication.
    if kind in _CENTRED_RMS_NORM and module.weight.dtype == torch.float32:
        return RMSNorm(1.0 + module.weight.data, module.eps)
    return None
