"""A model to plan for, from its configuration: a file, a known name, or what the hub has cached."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.cluster.planner.known_models import KNOWN_MODELS, KnownModel
from kvmesh.cluster.simulator.hardware import ModelShape
from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model.architectures import ARCHITECTURES
from kvmesh.workers.model.facts import check_supported, read_json
from kvmesh.workers.model.hub import HubModel
from kvmesh.workers.model.rope_scaling import RopeScaling
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.model.weight_coding import StoredWeights
from kvmesh.workers.rope_override import RopeOverride

if TYPE_CHECKING:
    from kvmesh.workers.model.weight_counts import WeightCounts


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """name: as `kvmesh serve --model` takes it
    config: of its config.json
    max_model_len: positions that the model supports, in tokens; trained_len: those that it was
        trained for before its RoPE was scaled
    obstacle: why this version does not serve the model, None if it does
    """

    name: str
    config: Mapping[str, Any]
    sizes: ModelSizes
    counts: WeightCounts
    max_model_len: int
    trained_len: int
    obstacle: str | None

    def with_rope(self, rope: RopeOverride | None) -> PlannedModel:
        """The model with another scaling in place of its own, if one is set."""
        if rope is None:
            return self
        return replace(self, max_model_len=rope.positions(self.trained_len)[1])

    def weight_bytes(self, weight_format: str, tp: int = 1, kvp: int = 1) -> int:
        """Of the rank that has most; weight_format: as in `engine`"""
        stored = StoredWeights.of(weight_format, self.config)
        return self.counts.bytes_of_rank(tp, kvp, stored)

    @property
    def shape(self) -> ModelShape:
        """For the model of service time."""
        sizes, counts = self.sizes, self.counts
        return ModelShape(
            name=self.name,
            params=float(counts.multiplied),
            layers=sizes.kv_layers,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            max_model_len=self.max_model_len,
            idle_params=float(counts.total - counts.multiplied),
            values_in_keys=sizes.values_in_keys,
        )

    def numbers_read(self, tokens: int) -> float:
        """Of the weights, how many a step of that many tokens reads, with experts chosen evenly."""
        sizes, counts = self.sizes, self.counts
        if not counts.idle:
            return float(counts.multiplied)
        asleep = 1.0 - sizes.experts_per_token / sizes.experts
        # Of the experts that one token leaves idle, `tokens` leave this share.
        return counts.multiplied + counts.idle * (1.0 - asleep ** (tokens - 1))


def planned_model(name: str) -> PlannedModel:
    """The model of a directory, a config.json, one of KNOWN_MODELS, or a hub name that is cached.

    Raises ConfigError naming `model` if there is none, or what its configuration lacks, and
    UnsupportedModelError for an architecture whose weights cannot be counted.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _of_config(read_json(path / "config.json"), path / "config.json", str(path))
    if path.suffix == ".json" or path.is_file():
        return _of_file(path)
    known = _known(name)
    if known is not None:
        return _of_config(known.config, known.hub, known.hub)
    named = HubModel.parse(name)
    if named is not None and (cached := named.cached("config.json")) is not None:
        return _of_config(read_json(cached), name, name)
    raise ConfigError("model", _not_found(name))


def _of_file(path: Path) -> PlannedModel:
    if path.suffix == ".gguf":
        raise ConfigError(
            "model",
            f"{path} is a GGUF file, whose configuration is not read here; "
            "expected a directory or a config.json",
        )
    return _of_config(read_json(path), path, str(path.parent))


def _of_config(config: Mapping[str, Any], source: Path | str, name: str) -> PlannedModel:
    """source: what errors name; name: as `serve` takes it"""
    # Imported here: it loads torch and transformers.
    from kvmesh.workers.model.weight_counts import WeightCounts

    config = standard_keys(config, Path(source))
    sizes = ModelSizes.of(config, source)
    with_positions = ARCHITECTURES[sizes.architecture].with_positions(config)
    positions = with_positions.get("max_position_embeddings")
    if type(positions) is not int or positions < 1:
        raise ConfigError(
            "model",
            f"{source}: max_position_embeddings must be a positive integer, got {positions!r}",
        )
    scaling = RopeScaling.of(config)
    return PlannedModel(
        name=name,
        config=config,
        sizes=sizes,
        counts=WeightCounts.of(sizes, config, source),
        max_model_len=scaling.max_model_len(with_positions),
        trained_len=scaling.trained_len(with_positions),
        obstacle=_obstacle(config, source),
    )


def _obstacle(config: Mapping[str, Any], source: Path | str) -> str | None:
    try:
        check_supported(config, Path(source))
    except UnsupportedModelError as error:
        return error.message
    return None


def _known(name: str) -> KnownModel | None:
    wanted = name.lower()
    for key, known in KNOWN_MODELS.items():
        hub = known.hub.lower()
        if wanted in (key, hub, hub.rpartition("/")[2]):
            return known
    return None


def _not_found(name: str) -> str:
    known = ", ".join(KNOWN_MODELS)
    close = difflib.get_close_matches(name.lower(), KNOWN_MODELS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"must be a directory, a config.json or one of {known}; got {name!r}{hint}"
