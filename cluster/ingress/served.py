"""The model that a cluster serves, as its groups report it."""

from __future__ import annotations

from kvmesh.cluster.errors import ContextExceededError, UnknownModelError
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.workers.loads import EngineInfo


def any_info(status: ClusterStatus) -> EngineInfo:
    """The facts of some group; what concerns the model is the same for all of them."""
    return next(iter(status.reports.values())).info


def max_model_len(status: ClusterStatus) -> int:
    """The longest context of any group, in tokens."""
    return max(report.info.max_model_len for report in status.reports.values())


def check_model(requested: str, status: ClusterStatus, aliases: frozenset[str]) -> None:
    """Raise UnknownModelError unless the name is empty, an alias, or the model's own."""
    served = any_info(status).model
    if requested and requested not in aliases and requested != served:
        raise UnknownModelError(requested, served)


def context_exceeded(prompt_tokens: int, status: ClusterStatus) -> ContextExceededError:
    """The error, with the bytes of the group with the longest context."""
    info = max((r.info for r in status.reports.values()), key=lambda i: i.max_model_len)
    geometry = info.geometry
    return ContextExceededError(
        prompt_tokens,
        info.max_model_len,
        geometry.bytes_of(geometry.peak_need(prompt_tokens + 1)),
        info.capacity_bytes,
    )
