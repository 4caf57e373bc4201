"""What groups need of a cluster's nodes, without Ray."""

from __future__ import annotations

import os

import pytest

from kvmesh.cluster.config import build
from kvmesh.cluster.resources import (
    alive,
    bundles,
    check_layouts,
    check_nodes,
    gpus_per_rank,
    logical_cpus,
)
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import ModelFacts

CPUS = {"CPU": 8.0, "memory": 1e9}
GPUS = {"CPU": 8.0, "GPU": 1.0}


FACTS = ModelFacts(
    name="small",
    revision="1",
    architecture="Qwen3MoeForCausalLM",
    num_layers=1,
    num_heads=6,
    num_kv_heads=6,
    head_dim=16,
    hidden_size=96,
    mlp_sizes=(),
    vocab_size=100,
    max_model_len=100,
    eos_token_ids=(),
    weight_bytes=1,
    dtype="float32",
    sliding_windows=(None,),
    num_experts=4,
    expert_size=9,
)


def test_each_groups_layout_must_divide_what_the_model_splits() -> None:
    check_layouts(build({"engine": {"tp": 3}, "groups": [{}, {"tp": 1}]}), FACTS)
    for values, field in (
        ({"engine": {"tp": 2}}, "engine.tp"),
        ({"engine": {"tp": 2}, "groups": [{"tp": 1}, {}]}, "groups.1.tp"),
    ):
        with pytest.raises(ConfigError, match=r"experts' MLP of 9.*: 1, 3; got 2") as caught:
            check_layouts(build(values), FACTS)
        assert caught.value.field == field
    by_expert = {"tp": 2, "expert_parallel": True}
    check_layouts(build({"engine": by_expert}), FACTS)
    with pytest.raises(ConfigError, match=r"4 experts.*: 1, 2; got 3"):
        check_layouts(build({"engine": by_expert | {"tp": 3}}), FACTS)


def test_groups_run_on_gpus_by_the_device_of_each() -> None:
    config = build({"engine": {"tp": 2}, "groups": [{}, {"device": "cpu"}, {"device": "cuda"}]})
    engines = config.group_engines().values()
    assert [gpus_per_rank(engine, {"GPU": 4.0}) for engine in engines] == [1.0, 0.0, 1.0]
    assert [gpus_per_rank(engine, {}) for engine in engines] == [0.0, 0.0, 1.0]
    check_nodes(config, [{**CPUS, "GPU": 4.0}])
    check_nodes(config, [{**CPUS, "GPU": 2.0}] * 2)
    for gpus, problem in ((3.0, r"need 4 GPUs .* has 3"), (0.0, r"need 2 GPUs .* has 0")):
        with pytest.raises(ConfigError, match=problem) as caught:
            check_nodes(config, [{**CPUS, "GPU": gpus}])
        assert caught.value.field == "groups"
    check_nodes(build({"groups": 2}), [CPUS])


def test_a_group_needs_a_node_of_its_size() -> None:
    config = build({"engine": {"tp": 4, "device": "cuda"}, "groups": [{"tp": 2}, {}]})
    with pytest.raises(ConfigError, match=r"on one node.* 4 GPUs and 4.1 CPUs.* 3 GPUs") as caught:
        check_nodes(config, [{**CPUS, "GPU": 2.0}, {**CPUS, "GPU": 3.0}, {**CPUS, "GPU": 1.0}])
    assert caught.value.field == "groups.1.tp"
    config = build({"engine": {"tp": 3, "cpus_per_rank": 3}})
    with pytest.raises(ConfigError, match=r"9.1 CPUs there.* has 0 GPUs and 8 CPUs") as caught:
        check_nodes(config, [CPUS, {"CPU": 4.0}])
    assert caught.value.field == "engine.tp"


def test_groups_that_come_later_may_bring_their_nodes() -> None:
    groups = {"groups": [{"tp": 1}, {"tp": 4}], "engine": {"device": "cuda"}}
    with pytest.raises(ConfigError, match="5 GPUs"):
        check_nodes(build(groups), [GPUS])
    check_nodes(build({**groups, "autoscaling": {"min_groups": 1}}), [GPUS])


def test_what_a_group_reserves() -> None:
    engine = build({"engine": {"tp": 2, "cpus_per_rank": 3}}).engine
    assert bundles(engine, 1.0) == [
        {"CPU": 0.1},
        {"CPU": 3.0, "GPU": 1.0},
        {"CPU": 3.0, "GPU": 1.0},
    ]
    assert bundles(engine, 0.0)[1:] == [{"CPU": 3.0}, {"CPU": 3.0}]


def test_dead_nodes_do_not_count() -> None:
    nodes = [{"Alive": True, "Resources": CPUS}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    assert alive(nodes) == [CPUS]


def test_logical_cpus_are_those_of_all_groups() -> None:
    many = (os.cpu_count() or 1) * 4
    config = build({"groups": [{"tp": many}, {"tp": 3, "cpus_per_rank": many}]})
    assert many * 4 < logical_cpus(config) <= many * 4 + 3
