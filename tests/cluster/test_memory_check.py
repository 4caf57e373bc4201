"""What could never run is refused before anything starts, by its setting, in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kvmesh.cluster import lifecycle
from kvmesh.cluster.autos import autos_here
from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.cluster.config import build
from kvmesh.cluster.memory_check import check_memory
from kvmesh.cluster.resources import check_devices
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import ModelFacts, read_facts
from tests.cluster.test_cli import run
from tests.model.small import make_small_model, make_small_tokenizer

GB = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    vocab_size = make_small_tokenizer(folder)
    make_small_model("LlamaForCausalLM", folder, vocab_size=vocab_size)
    return folder


@pytest.fixture(scope="module")
def facts(model: Path) -> ModelFacts:
    """A Llama of 8 layers, 4 KV heads of 64 channels and a context of 8,192 tokens."""
    return dataclasses.replace(
        read_facts(model), num_layers=8, num_kv_heads=4, head_dim=64, max_model_len=8192
    )


def refused(facts: ModelFacts, engine: dict[str, Any], **values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_memory(build({"engine": engine, **values}), facts, has_gpus=False)
    assert "\n" not in str(caught.value)
    return caught.value


def test_memory_that_holds_no_sequence(facts: ModelFacts) -> None:
    error = refused(facts, {"kv_format": "int8", "kv_memory_bytes": "1KiB"})
    assert error.field == "engine.kv_memory_bytes"
    # 2 exact pages of 64 tokens in fp32, and an int8 one with 8.5 bits per element.
    hot = 8 * 4 * 2 * 64 * 64 * 4
    assert f"needs {2 * hot + hot * 85 // 320:,} bytes" in error.message
    check_memory(build({}), facts, has_gpus=False)


def test_memory_is_checked_as_the_device_computes(facts: ModelFacts) -> None:
    """Exact pages of a GPU are half as large."""
    hot = 8 * 4 * 2 * 64 * 64 * 2
    memory = 2 * hot + hot * 85 // 160
    config = build({"engine": {"kv_format": "int8", "kv_memory_bytes": memory}})
    check_memory(config, facts, has_gpus=True)
    with pytest.raises(ConfigError):
        check_memory(config, facts, has_gpus=False)
    check_memory(build({"engine": {"device": "cuda"}}), facts, has_gpus=False)


def test_a_context_that_the_memory_does_not_hold(facts: ModelFacts) -> None:
    error = refused(facts, {"kv_memory_bytes": "16MiB", "max_model_len": 8192})
    assert error.field == "engine.max_model_len"
    longest = int(error.message.partition("holds ")[2].split()[0].replace(",", ""))
    assert 64 < longest < 8192
    fits = {"kv_memory_bytes": "16MiB", "max_model_len": longest}
    check_memory(build({"engine": fits}), facts, has_gpus=False)
    refused(facts, {**fits, "max_model_len": longest + 1})


def test_a_context_is_checked_with_the_share_of_exact_pages_that_a_gpu_has(
    facts: ModelFacts,
) -> None:
    """They have at most an eighth while `max_num_seqs` is a GPU's default."""
    engine = {"kv_format": "int8", "kv_memory_bytes": "16MiB", "max_model_len": 3000}
    check_memory(build({"engine": engine}), facts, has_gpus=True)
    with pytest.raises(ConfigError, match="does not fit"):
        check_memory(build({"engine": {**engine, "max_num_seqs": 64}}), facts, has_gpus=True)


def test_a_context_that_the_model_does_not_have(facts: ModelFacts) -> None:
    error = refused(facts, {"max_model_len": 8193})
    assert (error.field, "at most 8192" in error.message) == ("engine.max_model_len", True)


def test_a_context_is_that_of_the_groups_own_rope(facts: ModelFacts) -> None:
    facts = dataclasses.replace(facts, trained_len=4096)
    plain, yarn = {"kv_memory_bytes": "1GiB"}, {"type": "yarn", "factor": 4}
    for rope, longest in ((yarn, 16384), ({**yarn, "trained_len": 5000}, 20000)):
        engine = {**plain, "rope": rope, "max_model_len": longest}
        check_memory(build({"engine": engine}), facts, has_gpus=False)
        error = refused(facts, {**engine, "max_model_len": longest + 1})
        assert f"at most {longest}, the context of {facts.name} with engine.rope" in error.message
    groups: list[dict[str, Any]] = [{"rope": yarn}, {"rope": None}]
    check_memory(build({"engine": plain, "groups": groups}), facts, has_gpus=False)
    groups = [{**group, "max_model_len": 16384} for group in groups]
    assert refused(facts, plain, groups=groups).field == "groups.1.max_model_len"


def test_a_format_that_the_model_does_not_fit(facts: ModelFacts) -> None:
    odd = dataclasses.replace(facts, head_dim=20)
    error = refused(odd, {"kv_format": "k3v3"})
    assert error.field == "engine.kv_format"
    assert "head_dim" in error.message


@pytest.mark.parametrize("first", [{}, {"device": "cuda"}, {"kv_memory_bytes": "16MiB"}])
@pytest.mark.parametrize(
    "wrong", [{"kv_memory_bytes": 1000}, {"max_model_len": 8193}, {"kv_format": "k3v3"}]
)
def test_every_group_is_checked_by_its_own_path(
    facts: ModelFacts, first: dict[str, Any], wrong: dict[str, Any]
) -> None:
    """Also after one on a GPU, whose memory only its ranks know."""
    if "kv_format" in wrong:
        facts = dataclasses.replace(facts, head_dim=20)
    groups = [{"kv_format": "exact", **first}, wrong]
    assert refused(facts, {}, groups=groups).field == f"groups.1.{min(wrong)}"


def test_a_gpu_that_is_not_there() -> None:
    config = build({"groups": [{}, {"device": "cuda"}]})
    with pytest.raises(ConfigError, match="this machine has no GPU") as caught:
        check_devices(config, 0)
    assert caught.value.field == "groups.1.device"
    check_devices(config, 1)


def test_what_auto_is_here() -> None:
    config = build({"groups": [{"max_num_seqs": 4}, {"device": "cpu"}]})
    here = autos_here(config, [24 * GB, 80 * GB])
    assert here["engine", "device"] == "cuda"
    assert here["engine", "dtype"] == "bfloat16"
    assert here["engine", "max_num_batched_tokens"] == 2048, "as the smallest"
    assert ("groups", "0", "max_num_seqs") not in here, "it is given"
    assert here["groups", "1", "max_num_seqs"] == 16
    assert here["groups", "1", "cuda_graphs"] is False


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (("engine.kv_memory_bytes=1KiB",), "engine.kv_memory_bytes: 1,024 bytes cannot hold"),
        (("engine.max_model_len=100000000",), "engine.max_model_len: must be at most"),
        (("engine.tp=3",), "engine.tp: must divide the 4 KV heads"),
        (("groups=2",), "groups: need 2 GPUs (the sum of their tp · kvp), but the cluster has 1"),
        (("engine.device=cuda",), "engine.device: is cuda, but this machine has no GPU"),
    ],
)
def test_serve_refuses_before_ray_starts(
    model: Path, settings: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [80 * GB] if "GPUs" in problem else []
    monkeypatch.setattr(lifecycle, "local_gpu_memory", lambda _: gpus)
    # Another test of this process may have imported Ray.
    monkeypatch.setattr(lifecycle, "check_ray_sends_tokens", lambda: None)
    monkeypatch.setattr(lifecycle, "take_ports", lambda *_: pytest.fail("Ray would start"))
    sets = [part for setting in settings for part in ("--set", setting)]
    result = run("serve", "--model", str(model), *sets)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert result.stderr.startswith(f"error: {problem}"), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
