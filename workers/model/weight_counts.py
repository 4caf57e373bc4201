"""How many numbers a model's weights are on each rank, from its configuration alone.

    tp     queries, keys and values, and what belongs to their heads            divided by tp
    all    output and MLP projections, recurrent layers, experts, rows of the
           output layer                                                         divided by tp · kvp
    shared what heads of recurrent layers have in common, in groups: a rank
           has those of its heads, at least one
    whole  embeddings, norms, biases after a sum, routers of experts            on every rank

Its modules are built without memory, on torch's meta device, and divided as `Placer` does it.
Of these numbers, those of linears and experts may be stored in few bits (`weight_coding.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvmesh.workers.model.shard_plans import shard_of
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.stored import config_of
from kvmesh.workers.model.weight_coding import BF16_BYTES, StoredWeights

# What is done with a weight, or with a bias, of a module with that shard; the rest is whole.
_DIVIDED_BY_TP = frozenset(
    {
        "rows of heads",
        "queries, keys, values",
        "split norm",
        "module per head",
        "weight rows of heads",
    }
)
_DIVIDED_BY_ALL = frozenset(
    {"rows", "weight rows", "convolution", "channels", "gate, channels, steps"}
)
_PARTLY_SHARED = frozenset({"convolution", "gate, channels, steps"})
# Modules that are linears; of all of them, what ranks divide.
_LINEARS: Mapping[str, tuple[str, str]] = {
    "rows of heads": ("outputs", "tp"),
    "queries, keys, values": ("outputs", "tp"),
    "rows": ("outputs", "all"),
    "gate, up": ("outputs", "all"),
    "channels": ("outputs", "all"),
    "gate, channels, steps": ("outputs", "all"),
    "every row": ("outputs", "whole"),
    "columns": ("inputs", "all"),
}
_WEIGHTS_DIVIDED_BY_ALL = frozenset({"gate, up", "columns"})


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear's weight, as it is in a checkpoint.

    divided: of "outputs" or "inputs"; by: "tp", "all" or "whole"
    shared: of the outputs, those that `WeightCounts.shared_groups` divide
    is_expert: that it is one of a mixture
    """

    module: str
    outputs: int
    inputs: int
    divided: str
    by: str
    shared: int = 0
    is_expert: bool = False

    def of_rank(self, tp: int, ranks: int, shared_groups: int) -> tuple[int, int]:
        """Outputs and inputs on a rank."""
        parts = {"tp": tp, "all": ranks, "whole": 1}[self.by]
        if self.divided == "inputs":
            return self.outputs, self.inputs // parts
        shared = self.shared // shared_groups * max(shared_groups // ranks, 1)
        return (self.outputs - self.shared) // parts + shared, self.inputs


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """Numbers in a model's weights, by how ranks divide them; see the module.

    vocab_size, hidden_size: of the output layer, whose rows are divided over all ranks
    tied: the output layer's rows are those of the embeddings
    idle: of `all`, those of the experts that a token is not sent to
    shared_groups: that divide `shared`
    linears: equal ones together, and how many of them there are
    """

    tp: int
    all: int
    whole: int
    vocab_size: int
    hidden_size: int
    tied: bool
    idle: int
    shared: int = 0
    shared_groups: int = 1
    linears: tuple[tuple[_Linear, int], ...] = ()

    @classmethod
    def of(cls, sizes: ModelSizes, config: Mapping[str, Any], source: Path | str) -> WeightCounts:
        """config, source: as `ModelSizes.of` takes them.

        Raises UnsupportedModelError for a configuration that transformers refuses.
        """
        theirs = config_of(sizes.architecture, config, source)
        with torch.device("meta"):
            body = AutoModelForCausalLM.from_config(theirs).model
        counts: Counter[str] = Counter()
        linears: Counter[_Linear] = Counter()
        state = sizes.state
        groups, channels = (state.shared_groups, state.shared_channels) if state else (0, 0)
        for name, weight in body.named_parameters():
            module, _, kind = name.rpartition(".")
            shard = shard_of(theirs.model_type, module)
            counts[_part(shard, kind)] += weight.numel()
            if groups and shard in _PARTLY_SHARED:
                shared = groups * channels * weight.numel() // len(weight)
                counts["all"] -= shared
                counts["shared"] += shared
            if shard == "experts":
                counts["experts"] += weight.numel()
                linears.update(_experts(sizes, module, kind))
            elif shard in _LINEARS and kind == "weight":
                outputs, inputs = weight.shape
                both = groups * channels if shard in _PARTLY_SHARED else 0
                linears[_Linear(module, outputs, inputs, *_LINEARS[shard], both)] += 1
        idle = counts["experts"] * (sizes.experts - sizes.experts_per_token) // sizes.experts
        return cls(
            tp=counts["tp"],
            all=counts["all"],
            whole=counts["whole"],
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            tied=theirs.tie_word_embeddings,
            idle=idle,
            shared=counts["shared"],
            shared_groups=groups or 1,
            linears=tuple(linears.items()),
        )

    def bytes_of_rank(self, tp: int, kvp: int, stored: StoredWeights) -> int:
        """On the rank that has most, with all that is not coded in bfloat16."""
        ranks, numbers = tp * kvp, self.of_rank(tp, kvp)
        coded = 0
        for linear, count in self.linears:
            coding = stored.experts if linear.is_expert else stored.linears
            if coding is not None and not stored.left_out(f"model.{linear.module}"):
                outputs, inputs = linear.of_rank(tp, ranks, self.shared_groups)
                coded += count * coding.bytes_of(outputs, inputs)
                numbers -= count * outputs * inputs
        rows = -(-self.vocab_size // ranks)
        if stored.head is not None and not self.tied:
            coded += stored.head.bytes_of(rows, self.hidden_size)
            numbers -= rows * self.hidden_size
        return coded + BF16_BYTES * numbers

    def of_rank(self, tp: int, kvp: int = 1) -> int:
        """Numbers on the rank that has most."""
        ranks = tp * kvp
        rows = -(-self.vocab_size // ranks)
        # Tied rows are not stored twice, except on the last rank, where they are padded.
        own = self.hidden_size * rows if not self.tied or self.vocab_size % ranks else 0
        groups = max(self.shared_groups // ranks, 1)
        shared = self.shared // self.shared_groups * groups
        return self.tp // tp + self.all // ranks + shared + self.whole + own

    @property
    def total(self) -> int:
        """Numbers of the whole model."""
        return self.of_rank(1)

    @property
    def multiplied(self) -> int:
        """Numbers that a token is multiplied with: without embeddings and idle experts."""
        return self.tp + self.all + self.shared - self.idle + self.vocab_size * self.hidden_size


def _experts(sizes: ModelSizes, module: str, kind: str) -> Mapping[_Linear, int]:
    """The weights of one product of a layer's experts, of which ranks have a part of each."""
    width, hidden = sizes.moe_intermediate_size, sizes.hidden_size
    if kind.endswith("bias"):
        return {}
    if kind.startswith("down"):
        one = _Linear(module, hidden, width, "inputs", "all", is_expert=True)
    else:
        one = _Linear(module, 2 * width, hidden, "outputs", "all", is_expert=True)
    return {one: sizes.experts}


def _part(shard: str, kind: str) -> str:
    """Which part of WeightCounts a parameter of that name belongs to."""
    if shard in _DIVIDED_BY_TP:
        return "tp"
    if shard in _DIVIDED_BY_ALL or (shard in _WEIGHTS_DIVIDED_BY_ALL and kind == "weight"):
        return "all"
    if shard == "experts" and kind != "down_proj_bias":
        return "all"
    return "whole"
