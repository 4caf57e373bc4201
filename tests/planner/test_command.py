"""`kvmesh plan` as people and programs use it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import Result

from kvmesh.cluster.cli.plan_view import human_tokens
from kvmesh.cluster.planner.known_models import KNOWN_MODELS
from kvmesh.kernels.formats.registry import format_names
from tests.in_process import run_kvmesh
from tests.model.small import make_small_model

LONG_LLAMA = ("--model", "llama-3-8b-1048k", "--gpu", "H100", "--gpus", "8")


def run(*arguments: str) -> Result:
    return run_kvmesh(["plan", *arguments])


def test_it_prints_tables_within_80_columns_and_a_command_that_serve_takes() -> None:
    result = run(*LONG_LLAMA, "--context", "1M", "--concurrency", "200", "--kv-format", "k2v2,int8")
    assert result.exit_code == 0, result.output
    *table, command = result.stdout.strip().splitlines()
    assert max(map(len, table[1:])) <= 80 and "…" not in result.stdout
    assert "nothing fits" in command
    formats = ("--kv-format", "k4v4,int8-static")
    every = run(*LONG_LLAMA, "--context", "1M", "--all", *formats)
    assert max(map(len, every.stdout.splitlines()[1:-1])) <= 80 and "…" not in every.stdout
    assert "4 × tp 1 kvp 2 " in every.stdout and "int8-static †" in every.stdout

    result = run(*LONG_LLAMA, "--context", "2k", "--concurrency", "2400", "--page-size", "128")
    command = result.stdout.strip().splitlines()[-1]
    words = shlex.split(command)
    assert words[:2] == ["kvmesh", "serve"]
    config = run_kvmesh(["config", "--json", *words[2:]])
    engine = json.loads(config.stdout)["settings"]["engine"]
    assert (engine["kv_format"], engine["page_size"]) == ("k8v4", 128)
    assert engine["max_num_seqs"] == 2400 // 8


def test_the_command_quotes_a_directory(tmp_path: Path) -> None:
    path = make_small_model("LlamaForCausalLM", tmp_path / "my model")
    found = json.loads(run("--model", str(path), "--json").stdout)
    assert shlex.split(found["command"])[:4] == ["kvmesh", "serve", "--model", str(path)]


def test_json_has_every_plan_to_the_byte() -> None:
    result = run(*LONG_LLAMA, "--context", "1M", "--json")
    found = json.loads(result.stdout)
    assert found["target"]["context"] == 1 << 20
    plans = found["plans"]
    assert {plan["kv_format"] for plan in plans} == set(format_names(comparison=False))
    best = plans[found["recommended"]]
    assert best["kv_format"] == "k8v4" and best["is_served"]
    assert found["command"].endswith("--tp 8 --groups 1")
    # 16,384 pages, less the hot one: 264 bytes for 128 numbers and their scales in 8 bits, of
    # keys and values of 32 layers and 8 heads.
    (int8,) = (x for x in plans if x["kv_format"] == "int8" and x["layout"] == best["layout"])
    sealed, hot = 64 * 132, 64 * 256
    assert int8["sequence_bytes"] == 2 * 32 * 8 * (16384 * sealed)
    assert int8["geometry"]["hot_page_bytes"] == 2 * 32 * 1 * hot
    memory = best["memory"]
    parts = ("free", "context", "weight", "activation", "workspace", "kv")
    assert sum(memory[f"{part}_bytes"] for part in parts) == memory["total_bytes"]
    # Llama-3-8B with tp 8: 4 heads and 1 KV head. Results of decode's parts, of prefill's, and far
    # keys: 65,536 decoded tokens, and sums of the rows of a step.
    decode = 4096 * 4 * 129 * 4
    prefill = 1024 * 128 * 129 * 4
    far = 2 * 65536 * 128 * 2 + best["limits"]["max_num_batched_tokens"] * 4 * (128 * 8 + 16)
    assert memory["workspace_bytes"] == decode + prefill + far


def test_what_would_fit_but_is_not_served_is_said(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps({**KNOWN_MODELS["qwen3-30b-a3b"].config, **quantised}))
    result = run("--model", str(file), "--gpu", "h200", "--context", "1M", "--gpus", "2")
    assert result.exit_code == 0
    assert "kvmesh serve" not in result.stdout
    assert "its weights are quantised by bitsandbytes" in " ".join(result.stdout.split())
    assert "40,960 tokens" in result.stdout


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    result = run(*LONG_LLAMA, "--plot", str(file), "--quiet")
    assert result.exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "option", "complaint"),
    [
        (("--gpu", "h10"), "--gpu", "did you mean h100?"),
        (("--gpu", "tpu-v5"), "--gpu", "got 'tpu-v5'"),
        (("--gpus", "6"), "--gpus", "power of two"),
        (("--gpus", "0"), "--gpus", "power of two"),
        (("--kv-format", "int8,k4v3"), "--kv-format", "did you mean"),
        (("--kv-format", ""), "--kv-format", "got ''"),
        (("--context", "1.5"), "--context", "got '1.5'"),
        (("--context", "-1"), "--context", "got '-1'"),
        (("--context", "0"), "--context", "got '0'"),
        (("--context", "1G"), "--context", "got '1G'"),
        (("--context", "9" * 30), "--context", "up to"),
        (("--concurrency", "0"), "--concurrency", "got 0"),
        (("--page-size", "48"), "--page-size", "got 48"),
        (("--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization", "got 1.5"),
        (("--gpu-memory-utilization", "nan"), "--gpu-memory-utilization", "got nan"),
        (("--model", "lama-3-8b"), "--model", "did you mean llama-3-8b?"),
        (("--model", "no/such"), "--model", "got 'no/such'"),
        (("--model", "no/such.json"), "--model", "is missing"),
        (("--model", "model.gguf"), "--model", "got 'model.gguf'"),
    ],
)
def test_a_wrong_option_is_named(arguments: tuple[str, ...], option: str, complaint: str) -> None:
    result = run("--model", "llama-3-8b", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    said = " ".join(result.stderr.replace("│", " ").split())
    assert option in said and complaint in said
    as_json = run("--model", "llama-3-8b", "--json", *arguments)
    assert json.loads(as_json.stderr)["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        ("{}", "of model type None"),
        ('{"architectures": ["DeepseekV32ForCausalLM"]}', "DeepseekV32ForCausalLM"),
        ('{"architectures": ["LlamaForCausalLM"]}', "num_hidden_layers"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    result = run("--model", str(file))
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [(0, "0"), (1023, "1023"), (871_487, "851k"), (1 << 20, "1.00M"), (1_967_935, "1.87M")],
)
def test_tokens_are_rounded_down(tokens: int, shown: str) -> None:
    assert human_tokens(tokens) == shown
