"""How many numbers a model's weights are on each rank, from its configuration alone.

    tp     queries, keys and values, and what belongs to their heads            divided by tp
    all    output and MLP projections, recurrent layers, experts, rows of the
           output layer                                                         divided by tp · kvp
    shared what heads of recurrent layers have in common, in groups: a rank
           has those of its heads, at least one
    whole  embeddings, norms, biases after a sum, routers of experts            on every rank

Its modules are built without memory, on torch's meta device, and divided as `shards.py` does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kvmesh.workers.model.shards import shard_of
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.stored import config_of

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
_WEIGHTS_DIVIDED_BY_ALL = frozenset({"gate, up", "columns"})


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """Numbers in a model's weights, by how ranks divide them; see the module.

    vocab_size, hidden_size: of the output layer, whose rows are divided over all ranks
    tied: the output layer's rows are those of the embeddings
    idle: of `all`, those of the experts that a token is not sent to
    shared_groups: that divide `shared`
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

    @classmethod
    def of(cls, sizes: ModelSizes, config: Mapping[str, Any], source: Path | str) -> WeightCounts:
        """config, source: as `ModelSizes.of` takes them.

        Raises UnsupportedModelError for a configuration that transformers refuses.
        """
        theirs = config_of(sizes.architecture, config, source)
        with torch.device("meta"):
            body = AutoModelForCausalLM.from_config(theirs).model
        counts: Counter[str] = Counter()
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
        )

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


def _part(shard: str, kind: str) -> str:
    """Which part of WeightCounts a parameter of that name belongs to."""
    if shard in _DIVIDED_BY_TP:
        return "tp"
    if shard in _DIVIDED_BY_ALL or (shard in _WEIGHTS_DIVIDED_BY_ALL and kind == "weight"):
        return "all"
    if shard == "experts" and kind != "down_proj_bias":
        return "all"
    return "whole"
