"""Whether the memory that is set for KV can hold anything, checked before Ray starts."""

from __future__ import annotations

from typing import Final

from kvmesh.cluster.config import ClusterConfig, EngineSection
from kvmesh.cluster.resources import engines_by_setting
from kvmesh.kernels.formats.registry import format_of_name
from kvmesh.workers.config import DEFAULT_CPU_KV_MEMORY_BYTES
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.page_geometry import KVShape, geometry_of
from kvmesh.workers.pool_plan import plan_pool
from kvmesh.workers.sizes import PageGeometry, PageNeed

_ITEMSIZES: Final = {"float32": 4, "bfloat16": 2}


def check_memory(config: ClusterConfig, facts: ModelFacts, *, has_gpus: bool) -> None:
    """Raises ConfigError if a group could not hold one sequence, or not one as long as is set.

    What a GPU has free for KV is known only to its ranks, which check that; what is set is
    checked here, by the same arithmetic.

    facts: without any group's own RoPE scaling; has_gpus: whether `device: auto` means GPUs
    """
    for setting, engine in engines_by_setting(config).items():
        _check_context(setting, engine, facts)
        cuda = engine.device == "cuda" or (engine.device == "auto" and has_gpus)
        geometry = _geometry(setting, engine, facts, cuda=cuda)
        budget = engine.kv_memory_bytes
        if budget is None and not cuda:
            budget = DEFAULT_CPU_KV_MEMORY_BYTES
        if budget is not None:
            _check_pool(setting, engine, geometry, budget, cuda=cuda)


def _check_context(setting: str, engine: EngineSection, facts: ModelFacts) -> None:
    longest, scaled = facts.max_model_len, ""
    if engine.rope is not None:
        _, longest = engine.rope.positions(facts.trained_len)
        scaled = f" with {setting}.rope"
    if engine.max_model_len is not None and engine.max_model_len > longest:
        raise ConfigError(
            f"{setting}.max_model_len",
            f"must be at most {longest}, the context of {facts.name}{scaled}; "
            f"got {engine.max_model_len}",
        )


def _geometry(
    setting: str, engine: EngineSection, facts: ModelFacts, *, cuda: bool
) -> PageGeometry:
    dtype = engine.dtype
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    try:
        return geometry_of(
            format_of_name(engine.kv_format, facts.values_in_keys),
            KVShape.of(facts),
            page_size=engine.page_size,
            itemsize=_ITEMSIZES[dtype],
            tp=engine.tp,
            kvp=engine.kvp,
            sink_pages=engine.sink_pages,
            recent_pages=engine.recent_pages,
        )
    except ValueError as error:
        message = f"{engine.kv_format} does not fit {facts.name}: {error}"
        raise ConfigError(f"{setting}.kv_format", message) from None


def _check_pool(
    setting: str, engine: EngineSection, geometry: PageGeometry, budget: int, *, cuda: bool
) -> None:
    device = "cuda" if cuda else "cpu"
    limits = engine.limits(device)
    try:
        pool = plan_pool(
            budget,
            geometry,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_hot_share=engine.hot_share(device),
        )
    except ConfigError as error:
        raise ConfigError(f"{setting}.{error.field}", error.message) from None
    longest = engine.max_model_len
    if longest is not None and not geometry.peak_need(longest).fits(
        PageNeed(pool.hot_pages, pool.sealed_pages)
    ):
        raise ConfigError(
            f"{setting}.max_model_len",
            f"a sequence of {longest:,} tokens does not fit the KV memory of {budget:,} bytes a "
            f"rank, which holds {geometry.tokens_within(pool.sealed_pages):,} at most; set a "
            "larger kv_memory_bytes, or a KV format of fewer bits",
        )
