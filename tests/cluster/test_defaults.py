"""Defaults that stand twice, in the settings and in the part that is built from them."""

from __future__ import annotations

import inspect

import pytest

from kvmesh.cluster.config import (
    ClusterConfig,
    IngressSection,
    RouterSection,
    TenantSection,
    TimeoutSection,
)
from kvmesh.cluster.engine_service import EngineService
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.workers.channel import DEFAULT_START_TIMEOUT_S, ChannelExecutor
from kvmesh.workers.config import EngineConfig, EngineSettings
from kvmesh.workers.pool_plan import plan_pool
from kvmesh.workers.sampling_params import SamplingParams


def default_of(function: object, parameter: str) -> object:
    return inspect.signature(function).parameters[parameter].default  # type: ignore[arg-type]


LIMITS, INGRESS, ROUTER = Limits(), IngressSection(), RouterSection()
ENGINE = EngineSettings()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LIMITS.max_request_bytes, INGRESS.max_request_bytes),
        (LIMITS.max_stop_strings, INGRESS.max_stop_strings),
        (LIMITS.max_stop_chars, INGRESS.max_stop_chars),
        (LIMITS.max_choices, INGRESS.max_choices),
        (LIMITS.default_max_tokens, INGRESS.default_max_tokens),
        (LIMITS.max_timeout_s, TimeoutSection().request_s),
        (SamplingParams().max_tokens, INGRESS.default_max_tokens),
        (RouterConfig().lease_ttl_s, ROUTER.lease_ttl_s),
        (TenantPolicy().weight, TenantSection().weight),
        (TenantPolicy().quota_bytes, TenantSection().quota_bytes),
        (default_of(EngineService, "report_period_s"), ROUTER.report_period_s),
        (default_of(EngineService, "host"), INGRESS.host),
        (default_of(ChannelExecutor, "start_timeout_s"), TimeoutSection().start_s),
        (DEFAULT_START_TIMEOUT_S, TimeoutSection().start_s),
        (default_of(ChannelExecutor, "step_timeout_s"), ENGINE.step_timeout_s),
        (default_of(plan_pool, "max_hot_share"), ENGINE.max_hot_share),
    ],
)
def test_a_default_is_the_same_wherever_it_stands(one: object, other: object) -> None:
    assert one == other


def test_an_engines_settings_have_the_same_defaults_in_every_configuration() -> None:
    engine = EngineConfig(model="m")
    section = ClusterConfig().engine
    for name, field in EngineSettings.model_fields.items():
        assert getattr(engine, name) == getattr(section, name) == field.get_default(), name
