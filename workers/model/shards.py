"""Which weights of a model a rank holds, and loading them into its modules.

The plan is transformers' own (`base_model_tp_plan` of a configuration), plus what it
does not split: norms over heads, OLMo 2's norm over all heads, and StableLM, which has
no plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.model.weight_counts import divisors
from kvmesh.workers.model.weights import Weights
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.linears import ColumnLinear, RowLinear, SplitRMSNorm, VocabHead

_PROJECTIONS = {
    **{f"layers.*.self_attn.{name}_proj": "rows" for name in ("q", "k", "v")},
    "layers.*.self_attn.o_proj": "columns",
    "layers.*.mlp.gate_proj": "rows",
    "layers.*.mlp.up_proj": "rows",
    "layers.*.mlp.down_proj": "columns",
}
_FROM_TRANSFORMERS = {
    "colwise": "rows",
    "rowwise": "columns",
    "replicated_with_grad_allreduce": "whole",
}
_OWN_PLANS: Mapping[str, Mapping[str, str]] = {
    # transformers replicates queries and keys for the norm; SplitRMSNorm makes that unnecessary.
    "olmo2": {
        **_PROJECTIONS,
        "layers.*.self_attn.q_norm": "split norm",
        "layers.*.self_attn.k_norm": "split norm",
    },
    "stablelm": {
        **_PROJECTIONS,
        "layers.*.self_attn.q_layernorm.norms.*": "module per head",
        "layers.*.self_attn.k_layernorm.norms.*": "module per head",
    },
    "cohere": {
        **_PROJECTIONS,
        "layers.*.self_attn.q_norm": "weight rows",
        "layers.*.self_attn.k_norm": "weight rows",
    },
}


def check_tp(facts: ModelFacts, tp: int) -> None:
    """Raises ConfigError naming `tp` and its valid values unless it divides the heads."""
    valid = divisors(facts.num_kv_heads, facts.num_heads, facts.intermediate_size)
    if tp not in valid:
        raise ConfigError(
            "tp",
            f"must divide the {facts.num_kv_heads} KV heads of {facts.name}"
            f" (and its {facts.num_heads} heads and MLP of {facts.intermediate_size}):"
            f" {', '.join(map(str, valid))}; got {tp}",
        )


class Placer:
    """Fills a model that was built on the meta device with a rank's weights."""

    def __init__(self, model: Any, reader: Weights, comm: Communicator) -> None:
        self._model = model
        self._reader = reader
        self._comm = comm
        self._plan = _shard_plan(model.config)

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
            shard = self._plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix("model.")))
            self._place_one(name, module, shard or "whole")
        self._reader.check_all_read()

    def _place_one(self, name: str, module: nn.Module, shard: str) -> None:
        if shard == "rows":
            self._replace(name, self._column_linear(name, module))
        elif shard == "columns":
            self._replace(name, self._row_linear(name, module))
        elif shard == "split norm":
            self._replace(name, self._split_norm(name, module))
        elif shard == "module per head":
            self._fill(name, module)
        elif shard == "weight rows":
            self._fill_rows(name, module)
        else:
            assert shard == "whole", f"unknown shard: {shard}"
            self._fill(name, module)

    def _share(self, total: int) -> tuple[int, int]:
        """This rank's part of a dimension of `total`."""
        assert total % self._comm.size == 0, "call check_tp first"
        count = total // self._comm.size
        return self._comm.rank * count, (self._comm.rank + 1) * count

    def _column_linear(self, name: str, linear: Any) -> ColumnLinear:
        shape = linear.weight.shape
        first, end = self._share(shape[0])
        weight = self._reader.rows(f"{name}.weight", shape, first, end)
        if linear.bias is None:
            return ColumnLinear(weight, None)
        return ColumnLinear(
            weight, self._reader.rows(f"{name}.bias", linear.bias.shape, first, end)
        )

    def _row_linear(self, name: str, linear: Any) -> RowLinear:
        shape = linear.weight.shape
        weight = self._reader.columns(f"{name}.weight", shape, *self._share(shape[1]))
        bias = linear.bias
        if bias is not None:
            bias = self._reader.whole(f"{name}.bias", bias.shape)
        return RowLinear(weight, bias, self._comm)

    def _split_norm(self, name: str, norm: Any) -> SplitRMSNorm:
        shape = norm.weight.shape
        weight = self._reader.rows(f"{name}.weight", shape, *self._share(shape[0]))
        return SplitRMSNorm(weight, shape[0], norm.variance_epsilon, self._comm)

    def _head(self, head: Any) -> VocabHead:
        """Tied to the embeddings if the configuration says so, unless the checkpoint has separate
        weights that differ, like in transformers."""
        embeddings = self._model.get_input_embeddings().weight
        vocab_size = head.weight.shape[0]
        first, end, count = VocabHead.rows_of(self._comm.rank, self._comm.size, vocab_size)
        tied = self._model.config.tie_word_embeddings
        weight = embeddings[first:end]
        if not tied or "lm_head.weight" in self._reader:
            own = self._reader.rows("lm_head.weight", head.weight.shape, first, end)
            if not (tied and own.equal(weight)):
                weight = own
        if end - first < count:
            weight = nn.functional.pad(weight, (0, 0, 0, count - (end - first)))
        if head.bias is not None:
            raise ConfigError("model", "output projections with a bias are not supported")
        return VocabHead(weight, vocab_size, self._comm)

    def _fill(self, name: str, module: nn.Module) -> None:
        for key, weight in module._parameters.items():
            if weight is not None:
                value = self._reader.whole(f"{name}.{key}", weight.shape)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _fill_rows(self, name: str, module: nn.Module) -> None:
        for key, weight in module._parameters.items():
            if weight is not None:
                share = self._share(weight.shape[0])
                value = self._reader.rows(f"{name}.{key}", weight.shape, *share)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)


def _shard_plan(config: Any) -> Mapping[str, str]:
    """Module name with * for numbers -> its shard, relative to the base model."""
    own = _OWN_PLANS.get(config.model_type)
    if own is not None:
        return own
    return {
        pattern: _FROM_TRANSFORMERS[style] for pattern, style in config.base_model_tp_plan.items()
    }
