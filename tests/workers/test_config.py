"""An engine's configuration, built in Python: checked, named errors, safe to send."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "", "must have at least 1 character"),
        ("kv_format", "int9", r"did you mean int8\? .*, got 'int9'"),
        ("kv_format", "zip", "must be one of exact, int8, .*, got 'zip'"),
        ("page_size", 48, "must be one of 16, 32, 64, 128, 256, got 48"),
        ("sink_pages", -1, "must be greater than or equal to 0, got -1"),
        ("dtype", "half", "must be 'auto', 'float32' or 'bfloat16', got 'half'"),
        ("device", "tpu", "must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("kv_probe", "maybe", "must be 'off', 'warn' or 'refuse', got 'maybe'"),
        ("tp", 0, "must be greater than or equal to 1, got 0"),
        ("step_timeout_s", 0.0, "must be greater than 0, got 0.0"),
        ("step_timeout_s", float("inf"), "must be a finite number of seconds, .*, got inf"),
        ("kv_memory_bytes", 0, "must be greater than 0, got 0"),
        ("gpu_memory_utilization", float("nan"), "got nan"),
        ("max_hot_share", 1.0, "must be less than 1, got 1.0"),
        ("max_num_batched_tokens", 0, "must be greater than or equal to 1, got 0"),
        ("threads_per_rank", "two", "must be a whole number, got 'two'"),
        ("no_such", 1, "is not a setting"),
    ],
)
def test_a_wrong_value_is_refused_by_its_field(field: str, value: object, message: str) -> None:
    values: dict[str, Any] = {"model": "m", field: value}
    with pytest.raises(ConfigError, match=message) as caught:
        EngineConfig(**values)
    assert caught.value.field == field


def test_a_model_is_required() -> None:
    with pytest.raises(ConfigError, match="model: is required"):
        EngineConfig.model_validate({})


def test_a_replaced_field_is_checked() -> None:
    config = EngineConfig(model="m")
    assert config.replace(tp=2) == EngineConfig(model="m", tp=2)
    assert config.tp == 1
    with pytest.raises(ConfigError) as caught:
        config.replace(max_num_seqs=16, max_num_batched_tokens=15)
    assert r"must be at least max_num_seqs (16)" in caught.value.message
    assert caught.value.field == "max_num_batched_tokens"


def test_a_configuration_is_frozen_and_crosses_processes() -> None:
    config = EngineConfig(model="m", kv_memory_bytes=1 << 20)
    with pytest.raises(ValidationError, match="frozen"):
        config.tp = 2
    assert pickle.loads(pickle.dumps(config)) == config
