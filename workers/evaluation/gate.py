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
    others = alternatives(chosen, config.page_size, head_dim)
    advice = _advice(others, measure([fmt.name for fmt in others]), config.page_size, head_dim)
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
        fmt for fmt in formats if not fmt.needs_calibration and _holds(fmt, page_size, head_dim)
    ]
    return sorted(usable, key=lambda fmt: fmt.bits_per_element(page_size, head_dim))


def _holds(fmt: KVFormat, page_size: int, head_dim: int) -> bool:
    try:
        fmt.page_bytes(page_size, head_dim)
    except ValueError:  # not every format goes with every head_dim
        return False
    return True


def _advice(formats: list[KVFormat], kls_nats: list[float], page_size: int, head_dim: int) -> str:
    for fmt, kl_nats in zip(formats, kls_nats, strict=True):
        if kl_nats <= LIMIT_NATS:
            bits = fmt.bits_per_element(page_size, head_dim)
            return f"{fmt.name} with {bits:.2f} bits an element is at {kl_nats:.3f}"
    raise AssertionError("exact is 0 from itself")
