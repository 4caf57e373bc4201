"""`layout.mode: auto`, on the GPUs of nodes that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvmesh.cluster.auto_layout import NodeGpus, gpus_by_type, with_layout
from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.planner.known_models import KNOWN_MODELS
from kvmesh.cluster.simulator.hardware import GPUS
from kvmesh.workers.errors import ConfigError

H100 = GPUS["h100"].nvml_bytes
AUTO = {"mode": "auto"}


def laid_out(
    name: str, where: Path, nodes: NodeGpus, values: dict[str, Any] | None = None
) -> ClusterConfig:
    (where / "config.json").write_text(json.dumps(dict(KNOWN_MODELS[name].config)))
    return with_layout(build({"layout": AUTO, **(values or {})}), where, nodes)


def shape(config: ClusterConfig) -> tuple[int, int, int]:
    assert isinstance(config.groups, int)
    return config.groups, config.engine.tp, config.engine.kvp


@pytest.mark.parametrize(
    ("name", "gpus", "gpu", "context", "expected"),
    [
        # Fits one GPU: as many groups, which compute as many prompts at once.
        ("llama-3.1-8b", 8, "h100", "128k", (8, 1, 1)),
        # Two GPUs hold two sequences of a million tokens, and so on.
        ("llama-3-8b-1048k", 8, "h100", "1M", (4, 2, 1)),
        ("qwen2.5-7b-1m", 8, "l4", 1010000, (2, 4, 1)),
        ("llama-3.1-70b", 8, "h100", "128k", (2, 4, 1)),
        ("llama-3.1-8b", 1, "l40s", "32k", (1, 1, 1)),
    ],
)
def test_the_context_and_the_heads_decide(
    name: str,
    gpus: int,
    gpu: str,
    context: object,
    expected: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    nodes = [[GPUS[gpu].nvml_bytes] * gpus]
    config = laid_out(name, tmp_path, nodes, {"engine": {"max_model_len": context}})
    assert shape(config) == expected
    assert config.layout.mode == "given"
    assert config.layout.reason is not None and "KV heads" in config.layout.reason


def test_numbers_that_are_set_stay(tmp_path: Path) -> None:
    nodes = [[H100] * 8]
    values = {"engine": {"kvp": 2, "max_model_len": 65536}, "groups": 2}
    assert shape(laid_out("llama-3.1-8b", tmp_path, nodes, values)) == (2, 2, 2)
    assert shape(laid_out("llama-3.1-8b", tmp_path, nodes, {"engine": {"tp": 1}}))[1] == 1
    # One sequence is computed soonest by all GPUs, of which there are more than KV heads.
    one = {"layout": {**AUTO, "sequences": 1}, "engine": {"max_model_len": 65536}}
    assert shape(laid_out("qwen2.5-7b-1m", tmp_path, nodes, one)) == (1, 4, 2)
    four = {"layout": {**AUTO, "ranks": 4}, "engine": {"max_model_len": 65536}}
    assert shape(laid_out("llama-3.1-8b", tmp_path, nodes, four)) == (4, 1, 1)
    given = build({"engine": {"tp": 2}})
    assert with_layout(given, tmp_path, nodes) is given


def test_a_group_stays_on_one_node(tmp_path: Path) -> None:
    alone = {"layout": {**AUTO, "sequences": 1}, "engine": {"max_model_len": "64k"}}
    assert shape(laid_out("llama-3.1-8b", tmp_path, [[H100] * 8], alone)) == (1, 8, 1)
    assert shape(laid_out("llama-3.1-8b", tmp_path, [[H100] * 4] * 2, alone)) == (2, 4, 1)


def test_cpus_have_one_rank_unless_more_are_wanted(tmp_path: Path) -> None:
    assert shape(laid_out("llama-3.1-8b", tmp_path, [])) == (1, 1, 1)
    cpu = {"engine": {"device": "cpu"}}
    assert shape(laid_out("llama-3.1-8b", tmp_path, [[H100] * 8], cpu)) == (1, 1, 1)
    six = {"layout": {**AUTO, "ranks": 6}}
    assert shape(laid_out("smollm2-135m-instruct", tmp_path, [], six)) == (1, 3, 2)


@pytest.mark.parametrize(
    ("values", "field", "said"),
    [
        ({"engine": {"tp": 3}}, "engine.tp", "has engine.tp 3; there are: 8 × tp 1, 4 × tp 2"),
        ({"groups": 3}, "groups", "has groups 3"),
        ({"groups": [{}, {}]}, "groups", "makes all groups alike"),
        ({"layout": {**AUTO, "ranks": 16}}, "layout.ranks", "at most 8"),
        ({"layout": {**AUTO, "ranks": 6}}, "layout.ranks", "power of two"),
        ({"engine": {"max_model_len": "64M"}}, "engine.max_model_len", "the most of all"),
        ({"layout": {**AUTO, "sequences": 5000}}, "layout.sequences", "no layout holds 5000"),
    ],
)
def test_a_refusal_names_the_setting_and_what_there_is(
    values: dict[str, Any], field: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        laid_out("llama-3.1-8b", tmp_path, [[H100] * 8], values)
    assert caught.value.field == field


def test_a_context_that_no_memory_holds_is_cut_only_if_it_was_not_set(tmp_path: Path) -> None:
    config = laid_out("llama-3-8b-1048k", tmp_path, [[GPUS["l4"].nvml_bytes]])
    assert shape(config) == (1, 1, 1)


def test_the_context_is_that_of_the_rope_that_is_set(tmp_path: Path) -> None:
    nodes, engine = [[H100] * 8], {"rope": {"type": "yarn", "factor": 4}}
    config = laid_out("qwen3-8b", tmp_path, nodes, {"engine": engine})
    longest = 4 * KNOWN_MODELS["qwen3-8b"].config["max_position_embeddings"]
    assert config.layout.reason is not None and f" × {longest:,} tokens" in config.layout.reason


def test_gpus_of_a_ray_cluster_are_known_by_their_type() -> None:
    nodes = [
        {"CPU": 8.0},
        {"GPU": 2.0, "accelerator_type:H100": 1.0},
        {"GPU": 1.0, "accelerator_type:A100": 1.0},
    ]
    assert gpus_by_type(nodes) == [[H100] * 2, [GPUS["a100-40g"].nvml_bytes]]
    with pytest.raises(ConfigError, match="GPUs of type V100"):
        gpus_by_type([{"GPU": 1.0, "accelerator_type:V100": 1.0}])
