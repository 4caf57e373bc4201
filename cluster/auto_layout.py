"""`layout.mode: auto`: the groups, tp and kvp that suit a model, the GPUs and a context.

On GPUs the planner decides, by the memory and times of each layout (planner/plan.py); on CPUs one
group has all ranks, with as many of them over heads as there can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.config_text import changed
from kvmesh.kernels.formats.registry import format_of_name
from kvmesh.workers.errors import ConfigError

if TYPE_CHECKING:
    from kvmesh.cluster.planner.layout import Layout
    from kvmesh.cluster.planner.model import PlannedModel
    from kvmesh.cluster.planner.plan import Plan, Target
    from kvmesh.cluster.simulator.hardware import Gpu

# The GPUs of each node, by their memory in bytes as NVML counts it.
NodeGpus = Sequence[Sequence[int]]


def with_layout(config: ClusterConfig, model: Path, nodes: NodeGpus) -> ClusterConfig:
    """The settings with a layout, which `layout.mode: auto` leaves to be chosen, and with
    `layout.reason`; those whose layout is given as they are.

    `engine.tp`, `engine.kvp` and `groups` stay as they are where they are set.

    model: its directory; nodes: without any GPU, ranks run on CPUs
    Raises ConfigError naming the setting that no layout agrees with.
    """
    if config.layout.mode != "auto":
        return config
    if not isinstance(config.groups, int):
        raise ConfigError(
            "groups", "must be a number with layout.mode auto, which makes all groups alike"
        )
    gpus = [] if config.engine.device == "cpu" else [size for node in nodes for size in node]
    if gpus:
        layout, reason = _on_gpus(config, model, nodes)
    else:
        layout, reason = _on_cpus(config, config.groups, model)
    values = changed(config)
    values["engine"] = {**values.get("engine", {}), "tp": layout.tp, "kvp": layout.kvp}
    values["groups"] = layout.groups
    values["layout"] = {"reason": reason}
    return build(values)


def gpus_by_type(nodes: Sequence[Mapping[str, float]]) -> NodeGpus:
    """The GPUs of a Ray cluster's nodes, by the type that Ray has found.

    nodes: what each has in all; where a type comes with several memories, the smallest counts
    Raises ConfigError naming `layout.mode` for a type whose memory is not known.
    """
    from kvmesh.cluster.simulator.hardware import GPUS

    prefix, found = "accelerator_type:", []
    for node in nodes:
        if not (count := int(node.get("GPU", 0))):
            continue
        names = [name.removeprefix(prefix) for name in node if name.startswith(prefix)]
        sizes = [
            gpu.nvml_bytes
            for gpu in GPUS.values()
            for name in names
            if name.lower() in (gpu.name, gpu.name.partition("-")[0])
        ]
        if not sizes:
            raise ConfigError(
                "layout.mode",
                f"cannot be auto on GPUs of type {', '.join(names) or 'unknown'}, whose memory is "
                f"not known here (known are {', '.join(GPUS)}); set engine.tp, engine.kvp and "
                "groups",
            )
        found.append([min(sizes)] * count)
    return found


def _on_cpus(config: ClusterConfig, groups: int, model: Path) -> tuple[Layout, str]:
    from kvmesh.cluster.planner.layout import Layout, layouts_of
    from kvmesh.cluster.planner.model import planned_model

    ranks = config.layout.ranks
    if ranks is None:
        layout = Layout(groups, config.engine.tp, config.engine.kvp)
        return layout, f"{layout} on CPUs, as there is no GPU and layout.ranks is not set"
    possible = layouts_of(planned_model(str(model)).sizes, ranks)
    found = _agreeing(config, possible, ranks)
    # Fewest groups, whose context is longest; of these the most shares of heads, which divide
    # weights as well.
    best = min(found, key=lambda layout: (layout.groups, layout.kvp))
    return best, f"{best} of {ranks} ranks on CPUs: one group's context is the longest"


def _on_gpus(config: ClusterConfig, path: Path, nodes: NodeGpus) -> tuple[Layout, str]:
    from kvmesh.cluster.planner.layout import layouts
    from kvmesh.cluster.planner.model import planned_model
    from kvmesh.cluster.planner.plan import Target

    model = planned_model(str(path)).with_rope(config.engine.rope)
    count, largest = sum(map(len, nodes)), max(map(len, nodes))
    ranks = config.layout.ranks or count
    if ranks > count:
        raise ConfigError("layout.ranks", f"must be at most {count}, the GPUs that are there")
    try:
        possible = layouts(model.sizes, ranks)
    except ConfigError as error:
        raise ConfigError("layout.ranks", error.message) from None
    found = [x for x in _agreeing(config, possible, ranks) if x.ranks <= largest]
    if not found:
        raise ConfigError(
            "layout.mode",
            f"finds no layout whose groups are on one node: the largest has {largest} GPUs",
        )
    target = Target(
        context=config.engine.max_model_len or model.max_model_len,
        page_size=config.engine.page_size,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        weight_format=config.engine.weight_format,
    )
    gpu = _gpu(min(size for node in nodes for size in node))
    plan, target = _best(config, model, gpu, found, target)
    return plan.layout, _reason(plan, target, model, gpu, ranks)


def _gpu(memory_bytes: int) -> Gpu:
    """What plans are compared with: times only as they compare, memory to the byte."""
    from kvmesh.cluster.simulator.hardware import GPUS

    nearest = min(GPUS.values(), key=lambda gpu: abs(gpu.nvml_bytes - memory_bytes))
    return replace(nearest, memory_bytes=memory_bytes, nvml_bytes=memory_bytes)


def _agreeing(config: ClusterConfig, layouts: Sequence[Layout], ranks: int) -> list[Layout]:
    """The layouts with the numbers that are set. Raises ConfigError if there are none."""
    given: dict[str, int] = {
        f"engine.{name}": getattr(config.engine, name)
        for name in ("tp", "kvp")
        if name in config.engine.model_fields_set
    }
    if "groups" in config.model_fields_set:
        assert isinstance(config.groups, int)
        given["groups"] = config.groups
    found = [
        layout
        for layout in layouts
        if all(getattr(layout, name.removeprefix("engine.")) == n for name, n in given.items())
    ]
    if not found:
        wanted = " and ".join(f"{name} {number}" for name, number in given.items())
        raise ConfigError(
            next(iter(given), "layout.ranks"),
            f"no layout of {ranks} ranks has {wanted or 'what the model divides by'}; there are: "
            + (", ".join(map(str, layouts)) or "none"),
        )
    return found


def _best(
    config: ClusterConfig,
    model: PlannedModel,
    gpu: Gpu,
    found: Sequence[Layout],
    target: Target,
) -> tuple[Plan, Target]:
    """The layout that has computed as many contexts soonest as all GPUs can run at once.

    Raises ConfigError if none holds one sequence of the context that is set.
    """
    from kvmesh.cluster.planner.plan import plans_of, recommend

    fmt = format_of_name(config.engine.kv_format, model.sizes.values_in_keys)
    wanted = config.layout.sequences
    counts = [wanted] if wanted else [1 << n for n in range(found[0].total.bit_length())][::-1]
    for count in counts:
        target = replace(target, concurrency=count)
        plans = plans_of(model, gpu, found, [fmt], target, config.engine)
        if (best := recommend(plans, target, all_formats=False)) is not None:
            return best, target
    longest = max(plans, key=lambda plan: plan.longest)
    if config.engine.max_model_len is None and not wanted and longest.longest > 0:
        target = replace(target, context=longest.longest, concurrency=1)
        return longest, target  # the model's own context is longer than any memory
    setting = "layout.sequences" if wanted and longest.longest >= target.context else None
    raise ConfigError(
        setting or "engine.max_model_len",
        f"no layout holds {target.concurrency} × {target.context:,} tokens of {fmt.name} at once; "
        f"{longest.layout} holds {longest.longest:,} in one sequence, the most of all: set a "
        "smaller one, or a KV format of fewer bits",
    )


def _reason(plan: Plan, target: Target, model: PlannedModel, gpu: Gpu, ranks: int) -> str:
    choices = ", ".join(map(str, model.sizes.tp_choices))
    times = "" if plan.ttft_s is None else f", the first token of one after {plan.ttft_s:.3g} s"
    size = f"{gpu.nvml_bytes / (1 << 30):.0f} GiB"
    return (
        f"{plan.layout} of {ranks} GPUs with {size}: {plan.kv_format} "
        f"holds {plan.sequences} × {target.context:,} tokens at once, up to {plan.longest:,} in "
        f"one sequence{times}; tp divides the {model.sizes.kv_heads} KV heads ({choices}), kvp "
        "the pages"
    )
