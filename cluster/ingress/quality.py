"""KV formats that a request accepts, by name or by measured divergence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from kvmesh.cluster.errors import NoAllowedFormatError
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.kernels.formats.registry import get_format
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.loads import EngineInfo

# Mean KL(exact ‖ format) of the next token in nats, on held-out text with the worst of the models
# with which the format was measured: for those to serve and some others SmolLM2-135M,
# Qwen2.5-Coder-0.5B and Gemma 3 270M, else the first alone (docs/kv_formats.md,
# benchmarks/results/kv_formats.json; nuq: the calibrated table there).
# Other models have other figures, see `divergence_of`.
DIVERGENCE_NATS: Mapping[str, float] = {
    "exact": 0.0,
    "k8v4": 0.00056,
    "k4v4": 0.0023,
    "fp8": 0.0028,
    "kivi4": 0.0035,
    "int8": 0.0044,
    "nuq4": 0.0055,
    "k4v2": 0.0068,
    "g64-hqq4": 0.0074,
    "k3v2": 0.0086,
    "g64-int4": 0.0087,
    "k3v3": 0.0101,
    "nuq3": 0.0206,
    "k2v2": 0.0315,
    "nuq2": 0.0857,
    "turboquant-qjl": 0.0999,
    "kivi2": 0.2233,
    "int4": 0.8013,
    "g64-hqq2": 1.1808,
    "turboquant-sign": 1.2579,
    "g64-int2": 1.7147,
}


def divergence_of(info: EngineInfo, configured: Mapping[str, float]) -> float | None:
    """Of a group's KV format, in nats: as configured, else as measured when the group started,
    else as in the table; None if it was not measured."""
    name = get_format(info.kv_format).name
    if name in configured:
        return configured[name]
    if info.kv_divergence_nats is not None:
        return info.kv_divergence_nats
    return DIVERGENCE_NATS.get(name)


def refused_groups(
    request: pb.GenerateRequest | pb.EstimateBudgetRequest,
    status: ClusterStatus,
    configured: Mapping[str, float],
) -> frozenset[str]:
    """Groups whose KV format the request does not accept.

    configured: divergences of formats, see `divergence_of`
    Raises InvalidFieldError for a name or a bound that makes no sense, NoAllowedFormatError if no
    group is left.
    """
    allowed = frozenset(_formats(request.allowed_kv_formats))
    bound = None
    if request.HasField("max_kv_divergence_nats"):
        bound = request.max_kv_divergence_nats
        if not 0 <= bound < math.inf:
            raise InvalidFieldError(
                "max_kv_divergence_nats", f"must be finite and at least 0, got {bound:g}"
            )
    reasons = {
        group: reason
        for group, report in sorted(status.reports.items())
        if (reason := _why_not(report.info, allowed, bound, configured))
    }
    if reasons and len(reasons) == len(status.reports):
        raise NoAllowedFormatError(reasons)
    return frozenset(reasons)


def _formats(names: Sequence[str]) -> Iterator[str]:
    for index, name in enumerate(names):
        try:
            yield get_format(name).name
        except ValueError as error:
            raise InvalidFieldError(f"allowed_kv_formats[{index}]", str(error)) from None


def _why_not(
    info: EngineInfo,
    allowed: frozenset[str],
    bound: float | None,
    configured: Mapping[str, float],
) -> str:
    """Why a request does not accept a group's format; empty if it does."""
    name = get_format(info.kv_format).name
    if allowed and name not in allowed:
        return f"its format {name} is not among those allowed"
    if bound is not None:
        measured = divergence_of(info, configured)
        if measured is None:
            return f"the divergence of its format {name} was not measured"
        if not measured <= bound:  # NaN, too
            return f"its format {name} diverges by {measured:g} nats"
    return ""
