"""Which weights of a model a rank holds, and loading them into its modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvmesh.kernels.linear import GroupedWeight, PackedWeight, pack, unpack
from kvmesh.kernels.moe import SWIGLU, ExpertWeights, GatedUnit
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.embedding import PackedEmbedding
from kvmesh.workers.model.expert_weights import ExpertShare, read_experts, stored_router
from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.model.state_shape import StateShape
from kvmesh.workers.model.storage import Storage
from kvmesh.workers.model.weights import Weights
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.experts import Experts
from kvmesh.workers.parallel.linears import (
    ColumnLinear,
    RowLinear,
    SplitRMSNorm,
    Stored,
    VocabHead,
)

Share = Callable[[int], tuple[int, int]]  # of that many rows, a rank's first and end

_Plan = Mapping[str, str]
_ATTENTION: _Plan = {
    **{f"layers.*.self_attn.{name}_proj": "rows of heads" for name in ("q", "k", "v")},
    "layers.*.self_attn.o_proj": "columns",
}


def _mlp(name: str) -> _Plan:
    """Of an MLP, by its module's name."""
    inward: _Plan = {f"{name}.{part}_proj": "rows" for part in ("gate", "up")}
    return {**inward, f"{name}.down_proj": "columns"}


_MLP: _Plan = _mlp("layers.*.mlp")
_JOINED_ATTENTION: _Plan = {
    "layers.*.self_attn.qkv_proj": "queries, keys, values",
    "layers.*.self_attn.o_proj": "columns",
}
_JOINED_MLP: _Plan = {
    "layers.*.mlp.gate_up_proj": "gate, up",
    "layers.*.mlp.down_proj": "columns",
}
_MAMBA2: _Plan = {
    "layers.*.mamba": "weight rows",
    "layers.*.mamba.in_proj": "gate, channels, steps",
    "layers.*.mamba.conv1d": "convolution",
    "layers.*.mamba.norm": "weight rows",
    "layers.*.mamba.out_proj": "columns",
}
_DELTA_NET: _Plan = {
    "layers.*.linear_attn": "weight rows",
    "layers.*.linear_attn.conv1d": "convolution",
    "layers.*.linear_attn.out_proj": "columns",
    # Of Qwen3-Next, by key heads, and of Qwen3.5, one after another.
    **{f"layers.*.linear_attn.in_proj_{name}": "rows" for name in ("qkvz", "ba", "z", "b", "a")},
    "layers.*.linear_attn.in_proj_qkv": "channels",
}
_EXPERTS: _Plan = {"layers.*.mlp.experts": "experts", "layers.*.mlp.gate": "router"}


def _norms(names: str, shard: str) -> _Plan:
    """Of queries and keys, that are not whole on every rank."""
    return {f"layers.*.self_attn.{side}_{names}": shard for side in ("q", "k")}


_LATENT: _Plan = {
    "layers.*.self_attn.q_proj": "rows of heads",
    "layers.*.self_attn.q_a_proj": "every row",
    "layers.*.self_attn.q_b_proj": "rows of heads",
    "layers.*.self_attn.kv_a_proj_with_mqa": "every row",
    "layers.*.self_attn.kv_b_proj": "weight rows of heads",
    "layers.*.self_attn.o_proj": "columns",
    **_MLP,
    **_mlp("layers.*.mlp.shared_experts"),
    **_EXPERTS,
}


# Norms over all heads: transformers replicates queries and keys for them; SplitRMSNorm makes that
# unnecessary. Norms per head are whole.
_PLANS: Mapping[str, _Plan] = {
    "olmo2": {**_ATTENTION, **_MLP, **_norms("norm", "split norm")},
    "olmo3": {**_ATTENTION, **_MLP, **_norms("norm", "split norm")},
    "olmoe": {**_ATTENTION, **_EXPERTS, **_norms("norm", "split norm")},
    "stablelm": {**_ATTENTION, **_MLP, **_norms("layernorm.norms.*", "module per head")},
    "cohere": {**_ATTENTION, **_MLP, **_norms("norm", "weight rows of heads")},
    "phi3": {**_JOINED_ATTENTION, **_JOINED_MLP},
    "glm": {**_ATTENTION, **_JOINED_MLP},
    "glm4": {**_ATTENTION, **_JOINED_MLP},
    "qwen3_moe": {**_ATTENTION, **_MLP, **_EXPERTS},
    "mixtral": {**_ATTENTION, **_EXPERTS},
    "qwen3_next": {
        **_ATTENTION,
        **_MLP,
        **_mlp("layers.*.mlp.shared_expert"),
        **_EXPERTS,
        **_DELTA_NET,
    },
    "qwen3_5_text": {**_ATTENTION, **_MLP, **_DELTA_NET},
    "qwen3_5_moe_text": {
        **_ATTENTION,
        **_mlp("layers.*.mlp.shared_expert"),
        **_EXPERTS,
        **_DELTA_NET,
    },
    "granitemoehybrid": {
        **_ATTENTION,
        **_MAMBA2,
        "layers.*.shared_mlp.input_linear": "gate, up",
        "layers.*.shared_mlp.output_linear": "columns",
        "layers.*.block_sparse_moe.experts": "experts",
        "layers.*.block_sparse_moe.router": "router",
    },
    "bamba": {**_ATTENTION, **_MAMBA2, **_mlp("layers.*.feed_forward")},
    "recurrent_gemma": {
        **{f"layers.*.temporal_block.{part}_proj": "rows of heads" for part in "qkv"},
        "layers.*.temporal_block.o_proj": "columns",
        "layers.*.temporal_block.linear_x": "rows",
        "layers.*.temporal_block.linear_y": "rows",
        "layers.*.temporal_block.linear_out": "columns",
        "layers.*.temporal_block.conv_1d": "weight rows",
        "layers.*.temporal_block.rg_lru": "weight rows",
        **_mlp("layers.*.mlp_block"),
    },
    "llama4_text": {
        **_ATTENTION,
        **_mlp("layers.*.feed_forward"),
        **_mlp("layers.*.feed_forward.shared_expert"),
        "layers.*.feed_forward.experts": "experts",
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "gpt_oss": {**_ATTENTION, **_EXPERTS, "layers.*.self_attn": "weight rows of heads"},
}
_DENSE: _Plan = {**_ATTENTION, **_MLP}


def shard_of(model_type: str, module: str) -> str:
    """How ranks divide the weights of a module of the base model, by its name there."""
    plan = _PLANS.get(model_type, _DENSE)
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", module), "whole")


def _gated_unit(config: Any) -> GatedUnit:
    """Of the experts. Raises UnsupportedModelError for one that the kernels do not compute."""
    if config.model_type == "gpt_oss":
        return GatedUnit(config.swiglu_alpha, config.swiglu_limit, shift=1.0)
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(
            "model", f"experts with hidden_act {config.hidden_act} are not supported, only silu"
        )
    return SWIGLU


def _part(total: int, index: int, count: int) -> tuple[int, int]:
    assert total % count == 0, "call check_tp first"
    size = total // count
    return index * size, (index + 1) * size


class Placer:
    """Fills a model that was built on the meta device with a rank's weights.

    storage: of weights that the reader does not keep in the checkpoint's bits
    """

    def __init__(
        self,
        model: Any,
        reader: Weights,
        comm: Communicator,
        facts: ModelFacts,
        storage: Storage,
        *,
        expert_parallel: bool = False,
    ) -> None:
        self._model = model
        self._reader = reader
        self._comm = comm
        self._facts = facts
        self._storage = storage
        self._expert_parallel = expert_parallel

    def place(self) -> None:
        """Load every weight, replacing the modules whose weights are split.

        Raises ConfigError or UnsupportedModelError naming a tensor that is
        missing, has the wrong shape, or is not used.
        """
        for name, module in list(self._model.named_modules()):
            if not any(weight is not None for weight in module._parameters.values()):
                continue
            if name == "lm_head":
                self._replace(name, self._head(module))
                continue
            shard = shard_of(self._model.config.model_type, name.removeprefix("model."))
            self._place_one(name, module, shard)
        self._reader.check_all_read()
        self._pack_embeddings()

    def _place_one(self, name: str, module: Any, shard: str) -> None:
        if shard in ("rows", "rows of heads"):
            count = module.weight.shape[0]
            share = self._share(count) if shard == "rows" else self._head_share(count)
            self._replace(name, self._column_linear(name, module, share))
        elif shard == "every row":
            every = (0, module.weight.shape[0])
            self._replace(name, self._column_linear(name, module, every))
        elif shard == "columns":
            self._replace(name, self._row_linear(name, module))
        elif shard == "queries, keys, values":
            qkv = [(rows, self._head_share) for rows in self._qkv_parts()]
            self._replace(name, self._joined_linear(name, module, qkv))
        elif shard == "gate, up":
            halves = [(module.out_features // 2, self._share)] * 2
            self._replace(name, self._joined_linear(name, module, halves))
        elif shard == "channels":
            self._replace(name, self._joined_linear(name, module, self._channels()))
        elif shard == "gate, channels, steps":
            channels, steps = self._channels(), (self._state.memory[0], self._share)
            self._replace(name, self._joined_linear(name, module, [channels[0], *channels, steps]))
        elif shard == "experts":
            self._replace(name, self._experts(name))
        elif shard == "router":
            model_type = self._model.config.model_type
            self._fill_router(stored_router(self._reader, name, model_type), module)
        elif shard == "split norm":
            self._replace(name, self._split_norm(name, module))
        elif shard == "module per head":
            self._fill(name, module)
        elif shard == "weight rows":
            self._fill_rows(name, module, self._share)
        elif shard == "weight rows of heads":
            self._fill_rows(name, module, self._head_share)
        elif shard == "convolution":
            self._fill_convolution(name, module)
        else:
            assert shard == "whole", f"unknown shard: {shard}"
            self._fill(name, module)

    def _share(self, total: int) -> tuple[int, int]:
        """This rank's part of a dimension of `total` that all ranks divide."""
        return _part(total, self._comm.rank, self._comm.size)

    def _head_share(self, total: int) -> tuple[int, int]:
        """This rank's part of a dimension that is divided with the heads; the kvp ranks that have
        the same heads have the same part."""
        return _part(total, self._comm.tp_rank, self._comm.tp)

    def _column_linear(self, name: str, linear: Any, share: tuple[int, int]) -> ColumnLinear:
        shape = linear.weight.shape
        first, end = share
        kept = self._reader.kept(f"{name}.weight", shape)
        if kept is not None:
            weight: Stored = kept.rows(slice(first, end))
        else:
            weight = self._storage.pack(self._reader.rows(f"{name}.weight", shape, first, end))
        if linear.bias is None:
            return ColumnLinear(weight, None)
        return ColumnLinear(
            weight, self._reader.rows(f"{name}.bias", linear.bias.shape, first, end)
        )

    def _experts(self, name: str) -> Experts:
        facts, model_type = self._facts, self._model.config.model_type
        count, width = facts.num_experts, facts.expert_size
        experts, part = range(count), range(width)
        if self._expert_parallel:
            experts = range(*self._share(count))
        else:
            part = range(*self._share(width))
        share = ExpertShare(name, experts, part, facts.hidden_size, count, width)
        found = read_experts(self._reader, share, model_type)
        biases = {
            key: bias
            for key in ("gate_up_bias", "down_bias")
            if isinstance(bias := found.get(key), Tensor)
        }
        return Experts(
            self._packed_experts(found["gate_up"]),
            self._packed_experts(found["down"]),
            **biases,
            comm=self._comm,
            num_experts=count,
            first=experts.start,
            glu=_gated_unit(self._model.config),
        )

    def _packed_experts(self, weight: Tensor | GroupedWeight) -> ExpertWeights:
        """weight: [experts, outputs, inputs]"""
        return self._storage.pack(weight) if isinstance(weight, Tensor) else weight

    def _qkv_parts(self) -> list[int]:
        """Rows of a joined projection that are queries, keys and values."""
        config = self._model.config
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        keys = config.num_key_value_heads * head_dim
        return [config.num_attention_heads * head_dim, keys, keys]

    @property
    def _state(self) -> StateShape:
        assert self._facts.state is not None
        return self._facts.state

    def _channels(self) -> list[tuple[int, Share]]:
        """Rows of a convolution before a recurrence, and what ranks have of each: queries, keys
        and values of delta nets; of Mamba-2, x of all heads, and B and C of groups of them."""
        state = self._state
        if state.shared_groups:
            grouped = state.shared_groups * state.shared_channels
            each = (grouped // 2, self._group_share)
            return [(state.channels - grouped, self._share), each, each]
        heads, _, value_dim = state.memory
        values = heads * value_dim
        keys = (state.channels - values) // 2
        return [(keys, self._share), (keys, self._share), (values, self._share)]

    def _group_share(self, total: int) -> tuple[int, int]:
        """This rank's part of rows that groups of a recurrent layer's heads share."""
        first, end = self._state.shared_of(self._comm.rank, self._comm.size)
        size = total // self._state.shared_groups
        return first * size, end * size

    def _joined_linear(
        self, name: str, linear: Any, parts: Sequence[tuple[int, Share]]
    ) -> ColumnLinear:
        """parts: rows of the linears that are stored as one, and what a rank has of each"""
        assert linear.bias is None
        shape = linear.weight.shape
        kept = self._reader.kept(f"{name}.weight", shape)
        if kept is not None:
            rows = torch.cat([torch.arange(*part) for part in self._ranges(shape[0], parts)])
            return ColumnLinear(kept.rows(rows.to(kept.device)), None)
        return ColumnLinear(self._storage.pack(self._shares(f"{name}.weight", shape, parts)), None)

    def _shares(self, name: str, shape: torch.Size, parts: Sequence[tuple[int, Share]]) -> Tensor:
        """Of each part of a tensor's rows, this rank's share."""
        ranges = self._ranges(shape[0], parts)
        return torch.cat([self._reader.rows(name, shape, *part) for part in ranges])

    def _ranges(self, total: int, parts: Sequence[tuple[int, Share]]) -> list[tuple[int, int]]:
        """First and end of this rank's rows of each part."""
        ranges, start = [], 0
        for rows, share in parts:
            first, end = share(rows)
            ranges.append((start + first, start + end))
            start += rows
        assert start == total
        return ranges

    def _row_linear(self, name: str, linear: Any) -> RowLinear:
        shape = linear.weight.shape
        share = self._share(shape[1])
        kept = self._reader.kept(f"{name}.weight", shape)
        if kept is not None:
            weight: Stored = kept.columns(*share)
        else:
            weight = self._storage.pack(self._reader.columns(f"{name}.weight", shape, *share))
        bias = linear.bias
        if bias is not None:
            bias = self._reader.whole(f"{name}.bias", bias.shape)
        return RowLinear(weight, bias, self._comm)

    def _split_norm(self, name: str, norm: Any) -> SplitRMSNorm:
        shape = norm.weight.shape
        weight = self._reader.rows(f"{name}.weight", shape, *self._head_share(shape[0]))
        # Its sum over all ranks has every head kvp times.
        dim = shape[0] * self._comm.kvp
        return SplitRMSNorm(weight, dim, norm.variance_epsilon, self._comm)

    def _head(self, head: Any) -> VocabHead:
        """Tied to the embeddings if the configuration says so, unless the checkpoint has separate
        weights that differ, like in transformers."""
        embeddings = self._model.get_input_embeddings().weight
        vocab_size = head.weight.shape[0]
        first, end, count = VocabHead.rows_of(self._comm.rank, self._comm.size, vocab_size)
        if head.bias is not None:
            raise ConfigError("model", "output projections with a bias are not supported")
        tied = self._model.config.tie_word_embeddings
        kept = None if tied else self._reader.kept("lm_head.weight", head.weight.shape)
        if kept is not None and end - first == count:
            return VocabHead(kept.rows(slice(first, end)), vocab_size, self._comm)
        weight, pack_head = embeddings[first:end], self._storage.tied_head
        if not tied or "lm_head.weight" in self._reader:
            own = self._reader.rows("lm_head.weight", head.weight.shape, first, end)
            if not (tied and own.equal(weight)):
                weight, pack_head = own, self._storage.head
        if end - first < count:
            weight = nn.functional.pad(weight, (0, 0, 0, count - (end - first)))
        return VocabHead(pack_head(weight), vocab_size, self._comm)

    def _pack_embeddings(self) -> None:
        """Where linears are packed: in the same memory as a head with the same weights, if that
        is exact, otherwise for themselves."""
        embedding, head = self._model.get_input_embeddings(), self._model.lm_head.weight
        if type(embedding) is not nn.Embedding or not isinstance(head, PackedWeight):
            return
        plain = embedding.weight.data
        shared = head.shape == plain.shape and unpack(head).equal(plain)
        self._model.set_input_embeddings(PackedEmbedding(head if shared else pack(plain, "exact")))

    def _fill(self, name: str, module: nn.Module) -> None:
        for key, weight in module._parameters.items():
            if weight is not None:
                value = self._reader.whole(f"{name}.{key}", weight.shape)
                if value.dim() == 1:  # it would keep the whole file mapped
                    value = value.clone()
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _fill_router(self, name: str, router: nn.Module) -> None:
        """Biases that only choose experts, not weights of a sum, stay exact: in bfloat16 other
        experts could be chosen."""
        self._fill(name, router)
        for key, bias in router.named_buffers():
            value = self._reader.whole(f"{name}.{key}", bias.shape, torch.float32)
            setattr(router, key, value.clone())

    def _fill_convolution(self, name: str, module: Any) -> None:
        """Before a recurrence: a rank has its channels."""
        for key, weight in module._parameters.items():
            if weight is not None:
                value = self._shares(f"{name}.{key}", weight.shape, self._channels())
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _fill_rows(self, name: str, module: nn.Module, share: Share) -> None:
        for key, weight in module._parameters.items():
            if weight is not None:
                part = share(weight.shape[0])
                value = self._reader.rows(f"{name}.{key}", weight.shape, *part)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)
