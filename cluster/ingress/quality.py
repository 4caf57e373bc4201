"""The KV quality floor: which groups' formats a request does not accept."""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.cluster.reports import ClusterStatus
from kvmesh.cluster.routing.errors import ExceedsEveryGroupError
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.errors import InvalidFieldError

# Mean KL(exact ‖ format) of the next token in nats, on held-out text with SmolLM2-135M
# (docs/kv_formats.md, benchmarks/results/kv_formats.json; nuq: the calibrated table there).
# The order of formats matters here, not the figures; other models may order them otherwise:
# `ingress.kv_divergence_nats` overrides.
DIVERGENCE_NATS: Mapping[str, float] = {
    "exact": 0.0,
    "int8": 0.00007,
    "k8v4": 0.00043,
    "k4v4": 0.0023,
    "fp8": 0.0028,
    "kivi4": 0.0035,
    "nuq4": 0.0055,
    "k4v2": 0.0068,
    "g64-hqq4": 0.0074,
    "k3v2": 0.0086,
    "g64-int4": 0.0087,
    "k3v3": 0.0101,
    "int4": 0.0182,
    "nuq3": 0.0206,
    "k2v2": 0.0315,
    "turboquant-sign": 0.0462,
    "nuq2": 0.0857,
    "turboquant-qjl": 0.0999,
    "kivi2": 0.2233,
    "g64-hqq2": 1.1808,
    "g64-int2": 1.7147,
}


def groups_below(
    min_kv_format: str, status: ClusterStatus, divergence_nats: Mapping[str, float]
) -> frozenset[str]:
    """Groups whose format diverges further from exact KV than `min_kv_format` does.

    A format without a measured divergence meets only the floor of its own name.
    Raises InvalidFieldError for an unknown name, ExceedsEveryGroupError if no group is left.
    """
    if not min_kv_format:
        return frozenset()
    try:
        floor = get_format(min_kv_format).name
    except ValueError as error:
        raise InvalidFieldError("min_kv_format", str(error)) from None
    below = frozenset(
        group
        for group, report in status.reports.items()
        if not _meets(report.info.kv_format, floor, divergence_nats)
    )
    if len(below) == len(status.reports):
        infos = {group: status.reports[group].info for group in sorted(below)}
        raise ExceedsEveryGroupError(
            dict.fromkeys(below, 0),
            {group: info.capacity_bytes for group, info in infos.items()},
            {
                group: f"its format {info.kv_format} is less faithful than {floor}"
                for group, info in infos.items()
            },
        )
    return below


def _meets(kv_format: str, floor: str, divergence_nats: Mapping[str, float]) -> bool:
    name = get_format(kv_format).name
    if name == floor:
        return True
    known = divergence_nats.get(name), divergence_nats.get(floor)
    return known[0] is not None and known[1] is not None and known[0] <= known[1]
