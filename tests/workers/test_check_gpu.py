"""What a rank refuses on a GPU before it loads weights."""

from __future__ import annotations

import pytest

from kvmesh.kernels.formats.registry import format_of_model, get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.rank import check_gpu

LATENTS = format_of_model(get_format("int8"), 512)


def test_latents_need_a_gpu_with_enough_shared_memory() -> None:
    config = EngineConfig(model="deepseek")
    check_gpu(config, LATENTS, (8, 0))
    with pytest.raises(ConfigError, match=r"^model: .*8\.0 or newer.*this one has 7\.5$"):
        check_gpu(config, LATENTS, (7, 5))


def test_keys_and_values_of_their_own_do_not() -> None:
    check_gpu(EngineConfig(model="llama"), get_format("k8v4"), (7, 5))


def test_attention_over_latents_is_not_captured() -> None:
    config = EngineConfig(model="deepseek", cuda_graphs=True)
    check_gpu(config, get_format("k8v4"), (9, 0))
    with pytest.raises(ConfigError, match="cuda_graphs"):
        check_gpu(config, LATENTS, (9, 0))
