"""Fills a model with a rank's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvmesh.kernels.linear import GroupedWeight, PackedWeight, pack, unpack
from kvmesh.kernels.moe import SWIGLU, ExpertWeights, GatedUnit
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.embedding import PackedEmbedding
from kvmesh.workers.model.expert_weights import ExpertShare, read_experts, stored_router
from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.model.rank_rows import Range, RankRows
from kvmesh.workers.model.shard_plans import Shard, shard_of
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
        self._rank_rows = RankRows(comm, model.config, facts.state)

    def place(self) -> None:
        """Load every weight, replacing the modules whose weights are split.

        Raises ConfigError or UnsupportedModelError naming a tensor that is
        missing, has the wrong shape, or is not used.
        """
        for name, module in list(self._model.named_modules()):
            if not any(weight is not None for weight in module._parameters.values()):
                continue
            if name == "lm_head":
                placed: nn.Module | None = self._head(module)
            else:
                shard = shard_of(self._model.config.model_type, name.removeprefix("model."))
                placed = _PLACES[shard](self, name, module, shard)
            if placed is not None:
                parent, _, child = name.rpartition(".")
                setattr(self._model.get_submodule(parent), child, placed)
        self._reader.check_all_read()
        self._pack_embeddings()

    def _column_linear(self, name: str, linear: Any, shard: Shard) -> ColumnLinear:
        shape, bias = linear.weight.shape, linear.bias
        ranges = self._rank_rows.of(shard, shape[0])
        kept = self._reader.kept(f"{name}.weight", shape)
        if kept is not None:
            weight: Stored = kept.rows(_indices(ranges, kept.device))
        else:
            weight = self._storage.pack(self._rows(f"{name}.weight", shape, ranges))
        if bias is not None:
            bias = self._rows(f"{name}.bias", bias.shape, ranges)
        return ColumnLinear(weight, bias)

    def _row_linear(self, name: str, linear: Any, shard: Shard) -> RowLinear:
        shape, bias = linear.weight.shape, linear.bias
        part = self._rank_rows.all_ranks(shape[1])
        kept = self._reader.kept(f"{name}.weight", shape)
        if kept is not None:
            weight: Stored = kept.columns(*part)
        else:
            weight = self._storage.pack(self._reader.columns(f"{name}.weight", shape, *part))
        if bias is not None:
            bias = self._reader.whole(f"{name}.bias", bias.shape)
        return RowLinear(weight, bias, self._comm)

    def _experts(self, name: str, _: Any, shard: Shard) -> Experts:
        facts, model_type = self._facts, self._model.config.model_type
        count, width = facts.num_experts, facts.expert_size
        experts, part = range(count), range(width)
        if self._expert_parallel:
            experts = range(*self._rank_rows.all_ranks(count))
        else:
            part = range(*self._rank_rows.all_ranks(width))
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

    def _router(self, name: str, router: nn.Module, shard: Shard) -> None:
        """Biases that only choose experts, not weights of a sum, stay exact: in bfloat16 other
        experts could be chosen."""
        name = stored_router(self._reader, name, self._model.config.model_type)
        self._fill(name, router, shard)
        for key, bias in router.named_buffers():
            value = self._reader.whole(f"{name}.{key}", bias.shape, torch.float32)
            setattr(router, key, value.clone())

    def _split_norm(self, name: str, norm: Any, shard: Shard) -> SplitRMSNorm:
        shape = norm.weight.shape
        weight = self._rows(f"{name}.weight", shape, self._rank_rows.of(shard, shape[0]))
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

    def _fill(self, name: str, module: nn.Module, shard: Shard) -> None:
        for key, weight in _weights(module):
            value = self._reader.whole(f"{name}.{key}", weight.shape)
            if value.dim() == 1:  # it would keep the whole file mapped
                value = value.clone()
            module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _fill_rows(self, name: str, module: nn.Module, shard: Shard) -> None:
        for key, weight in _weights(module):
            ranges = self._rank_rows.of(shard, weight.shape[0])
            value = self._rows(f"{name}.{key}", weight.shape, ranges)
            module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _rows(self, name: str, shape: torch.Size, ranges: list[Range]) -> Tensor:
        parts = [self._reader.rows(name, shape, *part) for part in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


# What becomes of a module: a new one, or None where it is the same, filled.
_Place = Callable[[Placer, str, Any, Shard], nn.Module | None]
_PLACES: Mapping[Shard, _Place] = {
    "whole": Placer._fill,
    "module per head": Placer._fill,
    "rows": Placer._column_linear,
    "rows of heads": Placer._column_linear,
    "every row": Placer._column_linear,
    "queries, keys, values": Placer._column_linear,
    "gate, up": Placer._column_linear,
    "channels": Placer._column_linear,
    "gate, channels, steps": Placer._column_linear,
    "columns": Placer._row_linear,
    "weight rows": Placer._fill_rows,
    "weight rows of heads": Placer._fill_rows,
    "convolution": Placer._fill_rows,
    "split norm": Placer._split_norm,
    "experts": Placer._experts,
    "router": Placer._router,
}


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(key, weight) for key, weight in module._parameters.items() if weight is not None]


def _indices(ranges: list[Range], device: torch.device) -> Tensor | slice:
    """To choose these rows with."""
    if len(ranges) == 1:
        return slice(*ranges[0])
    return torch.cat([torch.arange(*each) for each in ranges]).to(device)


def _gated_unit(config: Any) -> GatedUnit:
    """Of the experts. Raises UnsupportedModelError for one that the kernels do not compute."""
    if config.model_type == "gpt_oss":
        return GatedUnit(config.swiglu_alpha, config.swiglu_limit, shift=1.0)
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(
            "model", f"experts with hidden_act {config.hidden_act} are not supported, only silu"
        )
    return SWIGLU
