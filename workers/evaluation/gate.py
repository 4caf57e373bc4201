"""Whether a model bears the KV format it is to be served with. Torch-free: decides, and asks
the ranks for the figures."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError

logger = logging.getLogger(__name__)

# Mean KL on the probe's text above which a format hurts; docs/evaluation.md says why.
LIMIT_NATS = 0.05
_MEASURED_AT_ONCE = 3

# Mean KL(exact ‖ format) of each format of those names.
Measure = Callable[[list[str]], list[float]]


def check_format(config: EngineConfig, head_dim: int, measure: Measure) -> None:
    """Carry out `config.kv_probe`: warn, or raise ConfigError(kv_format), where it hurts."""
    chosen = get_format(config.kv_format)
    if config.kv_probe == "off" or chosen.name == "exact":
        return
    (kl_nats,) = measure([chosen.name])
    if kl_nats <= LIMIT_NATS:
        logger.info("KV format %s: mean KL %.4f nats from exact", chosen.name, kl_nats)
        return
    logger.info("KV format %s: mean KL %.3f nats; looking for one that fits", chosen.name, kl_nats)
    advice = _advice(alternatives(chosen, config.page_size, head_dim), config, head_dim, measure)
    verdict = (
        f"{chosen.name} hurts this model: on a short text its next-token distribution is "
        f"{kl_nats:.3f} nats from exact KV's (mean KL; over {LIMIT_NATS} hurts); {advice}"
    )
    if config.kv_probe == "refuse":
        raise ConfigError("kv_format", f"{verdict} (kv_probe: refuse)")
    logger.warning("KV format %s", verdict)


def alternatives(chosen: KVFormat, page_size: int, head_dim: int) -> list[KVFormat]:
    """What could be served instead, without calibration, fewest bits first; `exact` last."""
    formats = [get_format(name) for name in format_names() if name != chosen.name]
    usable = [
        fmt
        for fmt in formats
        if not (fmt.needs_calibration or fmt.reference) and _holds(fmt, page_size, head_dim)
    ]
    return sorted(usable, key=lambda fmt: fmt.bits_per_element(page_size, head_dim))


def _holds(fmt: KVFormat, page_size: int, head_dim: int) -> bool:
    try:
        fmt.page_bytes(page_size, head_dim)
    except ValueError:  # not every format goes with every head_dim
        return False
    return True


def _advice(formats: list[KVFormat], config: EngineConfig, head_dim: int, measure: Measure) -> str:
    """What does not hurt; a few formats are measured at a time, which shares exact KV's part."""
    for at in range(0, len(formats), _MEASURED_AT_ONCE):
        several = formats[at : at + _MEASURED_AT_ONCE]
        for fmt, kl_nats in zip(several, measure([fmt.name for fmt in several]), strict=True):
            if kl_nats <= LIMIT_NATS:
                bits = fmt.bits_per_element(config.page_size, head_dim)
                return f"{fmt.name} with {bits:.2f} bits an element is at {kl_nats:.3f}"
    raise AssertionError("exact is 0 from itself")
