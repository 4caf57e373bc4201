"""Checks at load whether a KV format degrades the model too much. Torch-free: the ranks
measure, this module decides."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_names, format_of_model, get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError

logger = logging.getLogger(__name__)

# Mean KL on the probe's text above which a format is considered harmful, see docs/evaluation.md.
LIMIT_NATS = 0.05
_MEASURED_AT_ONCE = 3

# Mean KL(exact ‖ format) of each named format.
Measure = Callable[[list[str]], list[float]]


@dataclass(frozen=True, slots=True)
class FormatCheck:
    """What the probe has found out about the format that is served.

    divergence_nats: None if it was not measured
    warning: that the format hurts the model, and what to use instead; empty if it does not
    """

    divergence_nats: float | None = None
    warning: str = ""


def check_format(
    config: EngineConfig, head_dim: int, measure: Measure, values_in_keys: int = 0
) -> FormatCheck:
    """Apply `config.kv_probe`: if the format hurts, warn or raise ConfigError(kv_format).

    head_dim, values_in_keys: of the model, see `ModelFacts`
    Raises ConfigError(model) if no format would help, as with damaged weights.
    """
    chosen = get_format(config.kv_format)
    if config.kv_probe == "off" or chosen.name == "exact":
        return FormatCheck()
    (kl_nats,) = measure([chosen.name])
    if kl_nats <= LIMIT_NATS:
        logger.info("KV format %s: mean KL %.4f nats from exact", chosen.name, kl_nats)
        return FormatCheck(kl_nats)
    if not math.isfinite(kl_nats) and not math.isfinite(measure(["exact"])[0]):
        raise ConfigError(
            "model",
            "its logits are not finite numbers on a short text, also with exact KV; check its "
            "weights, and `dtype`",
        )
    logger.info("KV format %s: mean KL %.3f nats; looking for one that fits", chosen.name, kl_nats)
    others = alternatives(chosen, config.page_size, head_dim, values_in_keys)
    advice = _advice(others, config, head_dim, measure)
    verdict = (
        f"{chosen.name} hurts this model: on a short text its next-token distribution is "
        f"{kl_nats:.3f} nats from that of exact KV (mean KL; the limit is {LIMIT_NATS}); {advice}"
    )
    if config.kv_probe == "refuse":
        raise ConfigError("kv_format", f"{verdict} (kv_probe: refuse)")
    logger.warning("KV format %s", verdict)
    return FormatCheck(kl_nats, verdict)


def alternatives(
    chosen: KVFormat, page_size: int, head_dim: int, values_in_keys: int = 0
) -> list[KVFormat]:
    """Formats to serve instead, without calibration, fewest bits first; `exact` last."""
    formats = [get_format(name) for name in format_names() if name != chosen.name]
    usable = []
    for fmt in formats:
        if fmt.needs_calibration or fmt.comparison:
            continue
        try:
            found = format_of_model(fmt, values_in_keys)
            found.page_bytes(page_size, head_dim)
        except ValueError:  # not every format supports every model
            continue
        usable.append(found)
    return sorted(usable, key=lambda fmt: fmt.bits_per_element(page_size, head_dim))


def _advice(formats: list[KVFormat], config: EngineConfig, head_dim: int, measure: Measure) -> str:
    """The smallest format within the limit; measures a few at a time, sharing the exact run."""
    for at in range(0, len(formats), _MEASURED_AT_ONCE):
        several = formats[at : at + _MEASURED_AT_ONCE]
        for fmt, kl_nats in zip(several, measure([fmt.name for fmt in several]), strict=True):
            if kl_nats <= LIMIT_NATS:
                bits = fmt.bits_per_element(config.page_size, head_dim)
                return f"use {fmt.name}, with {bits:.2f} bits per element and {kl_nats:.3f} nats"
    raise AssertionError("exact has no divergence from itself")
