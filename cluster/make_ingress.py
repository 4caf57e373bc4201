"""An ingress from a cluster's settings."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress.codec import ModelCodec
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.link import Address
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.cluster.telemetry.traces import make_traces
from kvmesh.cluster.version import package_version
from kvmesh.workers.model.generation_defaults import ignored_generation_settings
from kvmesh.workers.model.source import resolve_tokenizer

logger = logging.getLogger("ray.serve")


def make_ingress(
    config: ClusterConfig,
    identity: Identity,
    find_router: Callable[[], Awaitable[Address]],
    meters: IngressMeters,
    limits: Limits,
) -> tuple[IngressService, ModelCodec]:
    """The service, not started, and the codec that it uses, which its owner closes.

    Reads the tokenizer, which blocks for about a second. Raises ConfigError.
    """
    path, name = resolve_tokenizer(config.model)
    codec = ModelCodec(path, config.ingress.tool_parser, config.ingress.reasoning_parser)
    codec.prepare()
    if ignored := ignored_generation_settings(path):
        logger.warning(
            "generation_config.json sets %s, which kvmesh does not implement", ", ".join(ignored)
        )
    service = IngressService(
        identity,
        find_router,
        codec,
        limits,
        meters,
        version=package_version(),
        model_names=frozenset({config.model, name}),
        queue_timeout_s=config.router.queue_timeout_s,
        defaults=config.generation.defaults(path),
        layout_reason=config.layout.reason or "",
        traces=make_traces(
            config.traces.endpoint, config.traces.sample_ratio, name, package_version()
        ),
    )
    return service, codec


def limits_of(config: ClusterConfig) -> Limits:
    return Limits(
        max_request_bytes=config.ingress.max_request_bytes,
        max_stop_strings=config.ingress.max_stop_strings,
        max_stop_chars=config.ingress.max_stop_chars,
        max_choices=config.ingress.max_choices,
        default_max_tokens=config.ingress.default_max_tokens,
        max_timeout_s=config.timeouts.request_s,
    )
