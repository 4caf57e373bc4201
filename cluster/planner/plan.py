"""What each layout and KV format can do, and which of them to serve.

Pages and bytes come from the functions that the engine divides its own pool with
(workers/sizes.py, workers/pool_plan.py), times from the service-time model of the simulator.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.cluster.planner.layout import Layout, layouts
from kvmesh.cluster.planner.memory import RankMemory, rank_memory
from kvmesh.cluster.planner.model import PlannedModel
from kvmesh.cluster.simulator.hardware import Gpu
from kvmesh.cluster.simulator.service_time import BF16_BYTES, EngineShape, ServiceTime
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_names, format_of_model, get_format
from kvmesh.workers.config import EngineSettings
from kvmesh.workers.device_limits import DeviceLimits
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.page_geometry import geometry_of
from kvmesh.workers.pool_plan import PoolPlan, plan_pool
from kvmesh.workers.sizes import PageGeometry

# Recommended without being asked for: the most accurate first, each on the model on which it is
# worst (docs/kv_formats.md).
BY_ACCURACY = ("k8v4", "k4v4", "int8", "k4v2", "k3v2", "k2v2")
DEFAULTS = EngineSettings()


class Limit(enum.Enum):
    """What keeps a context from being longer: the model's positions, the KV memory, weights that
    leave none, or exact pages, of which not even one sequence has enough."""

    MODEL = "model"
    MEMORY = "memory"
    WEIGHTS = "weights"
    EXACT_PAGES = "pages"


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be served.

    context: tokens of a sequence, prompt and output together
    concurrency: sequences of that length that run at once, on all groups together
    weight_format: as in `engine`
    """

    context: int
    concurrency: int = 1
    page_size: int = DEFAULTS.page_size
    gpu_memory_utilization: float = DEFAULTS.gpu_memory_utilization
    weight_format: str = DEFAULTS.weight_format


@dataclass(frozen=True, slots=True)
class Plan:
    """One layout with one KV format.

    bits: per element of a sealed page, including metadata
    memory: of the GPU that has most to hold; pool: its pages, None if the weights leave no room
    geometry: of that GPU's pages
    longest: tokens of the longest sequence that the pool holds, whatever the model supports
    sequence_bytes: KV of a sequence of the target's length, on all GPUs of its group
    sequences: of that length, at once on all groups, within engine.max_num_seqs
    limits: of an engine's steps; auto: what they are by default
    ttft_s: to the first token of a prompt of that length on an idle group
    tpot_s: per further token, with the target's concurrency; both None if it does not fit
    limit: what keeps the context from being longer
    obstacles: why this version does not serve it; empty if it does
    """

    layout: Layout
    kv_format: str
    bits: float
    needs_calibration: bool
    memory: RankMemory
    geometry: PageGeometry
    pool: PoolPlan | None
    longest: int
    sequence_bytes: int
    sequences: int
    limits: DeviceLimits
    auto: DeviceLimits
    ttft_s: float | None
    tpot_s: float | None
    limit: Limit
    obstacles: tuple[str, ...]

    def fits(self, target: Target) -> bool:
        return self.sequences >= target.concurrency

    @property
    def is_served(self) -> bool:
        return not self.obstacles


def make_plans(
    model: PlannedModel, gpu: Gpu, gpus: int, formats: Sequence[KVFormat], target: Target
) -> list[Plan]:
    """A plan for every layout and format. Raises ConfigError naming `gpus`, or `kv_format` for
    one that does not support the model's head_dim."""
    return plans_of(model, gpu, layouts(model.sizes, gpus), formats, target)


def plans_of(
    model: PlannedModel,
    gpu: Gpu,
    found: Sequence[Layout],
    formats: Sequence[KVFormat],
    target: Target,
    settings: EngineSettings = DEFAULTS,
) -> list[Plan]:
    """A plan for each of these layouts and formats; raises ConfigError like `make_plans`.

    settings: of the engines, as far as they bound steps and the KV memory
    """
    return [_plan(model, gpu, layout, fmt, target, settings) for layout in found for fmt in formats]


def default_formats(model: PlannedModel, page_size: int) -> list[KVFormat]:
    """Those for serving that support the model's head_dim, in the registry's order."""
    formats = [get_format(name) for name in format_names()]
    return [fmt for fmt in formats if not fmt.comparison and _supports(model, fmt, page_size)]


def recommend(plans: Sequence[Plan], target: Target, *, all_formats: bool) -> Plan | None:
    """The plan to serve, None if none fits.

    all_formats: no formats were asked for, so that accuracy decides before size

    Plans with the fewest obstacles come first; then the most accurate format; then the layout
    that has computed the first tokens of all sequences soonest, in the smallest groups.
    """
    fitting = [plan for plan in plans if plan.fits(target)]
    if all_formats:
        fitting = [plan for plan in fitting if plan.kv_format in BY_ACCURACY]

    def rank(plan: Plan) -> tuple[int, float, float, int]:
        accuracy = BY_ACCURACY.index(plan.kv_format) if all_formats else -plan.bits
        assert plan.ttft_s is not None
        rounds = math.ceil(target.concurrency / plan.layout.groups)
        return len(plan.obstacles), accuracy, rounds * plan.ttft_s, plan.layout.ranks

    return min(fitting, key=rank, default=None)


def serve_command(model: PlannedModel, plan: Plan, target: Target) -> str:
    """What starts the plan's groups. A calibrated format also needs the file of its parameters."""
    words = ["kvmesh serve", f"--model {shlex.quote(model.name)}", f"--kv-format {plan.kv_format}"]
    if plan.needs_calibration:
        words.append(f"--calibration {plan.kv_format}.safetensors")
    words.append(f"--tp {plan.layout.tp}")
    if plan.layout.kvp > 1:
        words.append(f"--kvp {plan.layout.kvp}")
    words.append(f"--groups {plan.layout.groups}")
    settings = [
        ("page_size", target.page_size, DEFAULTS.page_size),
        ("max_num_seqs", plan.limits.max_num_seqs, plan.auto.max_num_seqs),
        (
            "max_num_batched_tokens",
            plan.limits.max_num_batched_tokens,
            plan.auto.max_num_batched_tokens,
        ),
        (
            "gpu_memory_utilization",
            target.gpu_memory_utilization,
            DEFAULTS.gpu_memory_utilization,
        ),
        ("weight_format", target.weight_format, DEFAULTS.weight_format),
    ]
    words += [f"--set engine.{name}={value}" for name, value, usual in settings if value != usual]
    return " ".join(words)


def _plan(
    model: PlannedModel,
    gpu: Gpu,
    layout: Layout,
    fmt: KVFormat,
    target: Target,
    settings: EngineSettings,
) -> Plan:
    """With the engine's own limits, or if they run too few sequences, as many as are wanted."""
    wanted = math.ceil(target.concurrency / layout.groups)
    plan = _plan_with(model, gpu, layout, fmt, target, settings)
    if plan.sequences >= target.concurrency or settings is not DEFAULTS:
        return plan
    settings = EngineSettings(max_num_seqs=wanted)
    asked = _plan_with(model, gpu, layout, fmt, target, settings)
    return asked if asked.sequences >= target.concurrency else plan


def _plan_with(
    model: PlannedModel,
    gpu: Gpu,
    layout: Layout,
    fmt: KVFormat,
    target: Target,
    settings: EngineSettings,
) -> Plan:
    each = math.ceil(target.concurrency / layout.groups)
    limits = settings.limits("cuda", gpu.memory_bytes)
    memory = rank_memory(
        gpu,
        model,
        layout,
        fmt,
        max_model_len=settings.max_model_len or max(model.max_model_len, target.context),
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        gpu_memory_utilization=target.gpu_memory_utilization,
        weight_format=target.weight_format,
    )
    geometry = _geometry(model, fmt, target.page_size, layout, settings)
    budget = memory.kv_bytes if settings.kv_memory_bytes is None else settings.kv_memory_bytes
    pool = _pool(min(budget, memory.kv_bytes), geometry, limits, settings.hot_share("cuda"))
    longest = 0 if pool is None else geometry.tokens_within(pool.sealed_pages)
    at_once = 0 if pool is None else layout.groups * _at_once(pool, geometry, target.context)
    chunk = limits.max_num_batched_tokens
    times = _times(model, gpu, layout, fmt, target, chunk, each) if at_once else (None, None)
    whole = dataclasses.replace(geometry, kvp=1)
    return Plan(
        layout=layout,
        kv_format=fmt.name,
        bits=format_of_model(fmt, model.sizes.values_in_keys).bits_per_element(
            target.page_size, model.sizes.head_dim
        ),
        needs_calibration=fmt.needs_calibration,
        memory=memory,
        geometry=geometry,
        pool=pool,
        longest=longest,
        sequence_bytes=geometry.bytes_held(whole.need(target.context), 1),
        sequences=at_once,
        limits=limits,
        auto=DEFAULTS.limits("cuda", gpu.memory_bytes),
        ttft_s=times[0],
        tpot_s=times[1],
        limit=_limit(model, memory, pool, longest),
        obstacles=tuple(_obstacles(model, target)),
    )


def _supports(model: PlannedModel, fmt: KVFormat, page_size: int) -> bool:
    try:
        _geometry(model, fmt, page_size, Layout(1, 1))
    except ConfigError:
        return False
    return True


def _geometry(
    model: PlannedModel,
    fmt: KVFormat,
    page_size: int,
    layout: Layout,
    settings: EngineSettings = DEFAULTS,
) -> PageGeometry:
    try:
        found = geometry_of(
            fmt,
            dataclasses.replace(model.shape.kv, state=model.sizes.state),
            page_size=page_size,
            itemsize=BF16_BYTES,
            tp=layout.tp,
            kvp=layout.kvp,
        )
    except ValueError as error:
        raise ConfigError("kv_format", f"{fmt.name} does not fit the model: {error}") from None
    sink, recent = settings.sink_pages, settings.recent_pages
    return dataclasses.replace(
        found,
        sink_pages=found.sink_pages if sink is None else sink,
        recent_pages=found.recent_pages if recent is None else recent,
    )


def _pool(
    budget_bytes: int, geometry: PageGeometry, limits: DeviceLimits, max_hot_share: float
) -> PoolPlan | None:
    if budget_bytes <= 0:
        return None
    try:
        return plan_pool(
            budget_bytes,
            geometry,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_hot_share=max_hot_share,
        )
    except ConfigError:  # not even one sequence of two pages fits
        return None


def _at_once(pool: PoolPlan, geometry: PageGeometry, context: int) -> int:
    """How many sequences of that length one group runs at once."""
    sealed = geometry.peak_need(context).sealed
    return min(pool.max_num_seqs, pool.sealed_pages // sealed) if sealed else pool.max_num_seqs


def _times(
    model: PlannedModel,
    gpu: Gpu,
    layout: Layout,
    fmt: KVFormat,
    target: Target,
    chunk_tokens: int,
    decoding: int,
) -> tuple[float, float]:
    """Time to the first token of a prompt alone, and per token with `decoding` sequences."""
    shape = EngineShape(gpu, model.shape, fmt, gpus=layout.ranks, page_size=target.page_size)
    service = ServiceTime.of(shape)
    # Of the bytes of all weights in bfloat16; embeddings are among them, so that it is a bound.
    stored = model.weight_bytes(target.weight_format) / (BF16_BYTES * model.counts.total)

    def reading(tokens: int) -> ServiceTime:
        """With the weights that a step of that many tokens reads."""
        share = stored * model.numbers_read(tokens) / model.counts.multiplied
        return dataclasses.replace(service, weights_s=service.weights_s * share)

    first_s = reading(chunk_tokens).alone(target.context, chunk_tokens)
    return first_s, reading(decoding).step(0, 0.0, decoding, decoding * target.context)


def _limit(model: PlannedModel, memory: RankMemory, pool: PoolPlan | None, longest: int) -> Limit:
    if pool is None:
        return Limit.WEIGHTS if memory.kv_bytes <= 0 else Limit.EXACT_PAGES
    return Limit.MEMORY if longest < model.max_model_len else Limit.MODEL


def _obstacles(model: PlannedModel, target: Target) -> list[str]:
    found = []
    if model.obstacle is not None:
        found.append(model.obstacle)
    if target.context > model.max_model_len:
        found.append(
            f"the model's own context is {model.max_model_len:,} tokens; a longer one needs a "
            "variant that was trained for it, or RoPE scaling in its config.json"
        )
    return found
