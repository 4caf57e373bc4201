"""What the groups of a cluster need of its nodes, checked before anything is deployed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvmesh.cluster.config import ClusterConfig, EngineSection
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.model.sizes import check_tp

CONTROL_CPUS: Final = 0.1  # of ingress, router and leaders: they ask Ray for little

Resources = Mapping[str, float]


def check_layouts(config: ClusterConfig, facts: ModelFacts) -> None:
    """Raises ConfigError unless each group's tp and kvp divide what the model splits over ranks."""
    for setting, engine in engines_by_setting(config).items():
        try:
            check_tp(facts, engine.tp, engine.kvp, expert_parallel=engine.expert_parallel)
        except ConfigError as error:
            raise ConfigError(f"{setting}.{error.field}", error.message) from None


def check_devices(config: ClusterConfig, gpus: int) -> None:
    """Raises ConfigError if a group asks for GPUs on a machine that has none."""
    for setting, engine in engines_by_setting(config).items():
        if engine.device == "cuda" and not gpus:
            raise ConfigError(
                f"{setting}.device",
                "is cuda, but this machine has no GPU that NVIDIA's driver knows and "
                "CUDA_VISIBLE_DEVICES does not hide; use auto or cpu",
            )


def engines_by_setting(config: ClusterConfig) -> dict[str, EngineSection]:
    """The engines that differ, by the path at which they are configured."""
    if isinstance(config.groups, int):
        return {"engine": config.engine}
    return {f"groups.{i}": e for i, e in enumerate(config.group_engines().values())}


def logical_cpus(config: ClusterConfig) -> int:
    """The machine's CPUs; more if the groups ask for more, which then share the machine's."""
    engines = config.group_engines().values()
    needed = sum(CONTROL_CPUS + engine.ranks * engine.cpus_per_rank for engine in engines)
    needed += CONTROL_CPUS * (config.ingress.replicas + 1)
    return max(os.cpu_count() or 1, math.ceil(needed) + 1)


def bundles(engine: EngineSection, gpus_per_rank: float) -> list[dict[str, float]]:
    """What Ray reserves for a group on one node: for the leader, then for each rank."""
    rank = {"CPU": engine.cpus_per_rank, "GPU": gpus_per_rank}
    rank = {name: amount for name, amount in rank.items() if amount}
    return [{"CPU": CONTROL_CPUS}, *(dict(rank) for _ in range(engine.ranks))]


def gpus_per_rank(engine: EngineSection, cluster: Resources) -> float:
    """1 if a group's ranks run on GPUs, by the setting or by what the cluster has now; else 0."""
    if engine.device == "auto":
        return float(cluster.get("GPU", 0.0) > 0)
    return float(engine.device == "cuda")


def check_nodes(config: ClusterConfig, nodes: Sequence[Resources]) -> None:
    """Raises ConfigError unless the cluster has the GPUs, and for each group a node is enough.

    Groups that run only at times are not checked: their nodes may come with them.

    nodes: what each has in all
    """
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    gpus = sum(
        engine.ranks * gpus_per_rank(engine, total) for engine in config.first_groups().values()
    )
    if gpus > total["GPU"]:
        raise ConfigError(
            "groups",
            f"need {gpus:g} GPUs (the sum of their tp · kvp), but the cluster has {total['GPU']:g}",
        )
    first = len(config.first_groups())
    for setting, engine in list(engines_by_setting(config).items())[:first]:
        needed = _sum(bundles(engine, gpus_per_rank(engine, total)))
        if not any(_fits(needed, node) for node in nodes):
            largest = max(nodes, key=lambda node: [node.get(name, 0.0) for name in ("GPU", "CPU")])
            name = "tp" if engine.kvp == 1 else "kvp"
            raise ConfigError(
                f"{setting}.{name}",
                f"a group is on one node: this one needs {_shown(needed)} there, but the largest "
                f"node has {_shown(largest)}; use a smaller {name} or larger nodes",
            )


def _sum(parts: Sequence[Resources]) -> dict[str, float]:
    return {
        name: round(sum(part.get(name, 0.0) for part in parts), 3)
        for name in dict.fromkeys(name for part in parts for name in part)
    }


def _fits(needed: Resources, node: Resources) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in needed.items())


def _shown(resources: Resources) -> str:
    return " and ".join(f"{resources.get(name, 0.0):g} {name}s" for name in ("GPU", "CPU"))


def alive(nodes: Sequence[Mapping[str, Any]]) -> list[Resources]:
    """What each node has that is alive. nodes: as Ray describes them"""
    return [node["Resources"] for node in nodes if node["Alive"]]
