"""How far KV formats diverge from exact KV."""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.kernels.formats.registry import get_format
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
