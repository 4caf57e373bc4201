"""What groups that differ need of a machine, without Ray."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from kvmesh.cluster import lifecycle
from kvmesh.cluster.config import build
from kvmesh.workers.errors import ConfigError


def machine_with(monkeypatch: pytest.MonkeyPatch, gpus: float) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": gpus})
    monkeypatch.setattr(lifecycle, "_import_ray", lambda: ray)


def test_each_groups_layout_must_divide_the_models_heads() -> None:
    lifecycle._check_layouts(build({"engine": {"tp": 3}, "groups": [{}, {"tp": 1}]}), 3)
    for values, field in (
        ({"engine": {"tp": 2}}, "engine.tp"),
        ({"engine": {"tp": 2}, "groups": [{"tp": 1}, {}]}, "groups.1.tp"),
    ):
        with pytest.raises(ConfigError, match="one of 1, 3; got 2") as caught:
            lifecycle._check_layouts(build(values), 3)
        assert caught.value.field == field


def test_groups_run_on_gpus_by_the_device_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build({"engine": {"tp": 2}, "groups": [{}, {"device": "cpu"}, {"device": "cuda"}]})
    machine_with(monkeypatch, gpus=4.0)
    assert lifecycle._gpus_per_rank(config) == {
        "engine-0": 1.0,
        "engine-1": 0.0,
        "engine-2": 1.0,
    }
    machine_with(monkeypatch, gpus=3.0)
    with pytest.raises(ConfigError, match=r"need 4 GPUs .* has 3"):
        lifecycle._gpus_per_rank(config)
    machine_with(monkeypatch, gpus=0.0)
    assert lifecycle._gpus_per_rank(build({"groups": 2})) == {"engine-0": 0.0, "engine-1": 0.0}
    with pytest.raises(ConfigError, match=r"need 2 GPUs .* has 0"):
        lifecycle._gpus_per_rank(config)


def test_logical_cpus_are_those_of_all_groups() -> None:
    many = (os.cpu_count() or 1) * 4
    config = build({"groups": [{"tp": many}, {"tp": 3, "cpus_per_rank": many}]})
    assert many * 4 < lifecycle._logical_cpus(config) <= many * 4 + 3
