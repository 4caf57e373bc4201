"""`kvmesh simulate`: what it prints, and what it says of files that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

from kvmesh.cluster.simulator.hardware import model_shape
from kvmesh.workers.errors import ConfigError
from tests.in_process import run_kvmesh

QWEN = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}


def run(*arguments: str) -> Result:
    return run_kvmesh(["simulate", *arguments])


def test_it_runs_without_a_trace_within_80_columns() -> None:
    result = run("--limit", "60", "--policy", "all")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    for policy in ("kvmesh", "dynamo", "fifo-worst-case", "clairvoyant"):
        assert policy in result.output


def test_it_prints_everything_as_json_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    trace = "synthetic:decode-smooth-private"
    result = run("--trace", trace, "--limit", "20", "--json", "--plot", str(plot))
    (summary,) = json.loads(result.stdout)
    assert (summary["policy"], summary["requests"]) == ("kvmesh", 20)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_long_prompts_and_tenants_have_a_line_of_their_own() -> None:
    result = run("--limit", "40", "--tenants", "2", "--inject-long", "1@50000")
    assert "TTFT of the long prompts" in result.output
    assert "fairness between tenants" in result.output


def test_groups_that_come_and_go_have_a_line_of_their_own() -> None:
    trace = ("--trace", "synthetic:decode-smooth-private", "--limit", "300", "--groups", "3")
    result = run(*trace, "--rate", "0.3", "--tide", "0.9@200", "--autoscale", "1")
    assert result.exit_code == 0
    assert "kvmesh 1-3: groups ran for" in result.output
    assert "kvmesh: groups ran for" not in result.output, "all of them ran all the time"
    wrong = run(*trace, "--tide", "fast")
    assert wrong.exit_code == 2 and "SWING@SECONDS, got 'fast'" in wrong.stderr


def test_any_model_configuration_will_do(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN))
    assert model_shape(str(tmp_path)) == model_shape(str(file))
    shape = model_shape(str(file))
    assert shape.params == pytest.approx(1.54e9, rel=0.02)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (12, 2, 128)
    file.write_text(json.dumps({"text_config": QWEN}))
    assert model_shape(str(file)) == shape
    assert run("--limit", "5", "--model", str(tmp_path)).exit_code == 0


def test_idle_experts_take_memory_and_no_time(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
    file.write_text(json.dumps(QWEN | experts))
    expert = 28 * 3 * 1536 * 1024
    assert model_shape(str(file)).idle_params == 6 * expert


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "JSON object"),
        ("{", "cannot be read"),
        (json.dumps({}), "hidden_size"),
        (json.dumps(QWEN | {"num_attention_heads": 0}), "num_attention_heads"),
        (json.dumps(QWEN | {"vocab_size": "many"}), "vocab_size"),
        (json.dumps(QWEN | {"num_hidden_layers": True}), "num_hidden_layers"),
        (json.dumps(QWEN | {"kv_lora_rank": 512}), "kv_lora_rank"),
    ],
)
def test_a_model_that_does_not_say_its_cost_is_named(
    tmp_path: Path, content: str, complaint: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises((ValueError, ConfigError), match=complaint):
        model_shape(str(file))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("trace.jsonl", b'{"timestamp": 1}\n', "line 1"),
        ("trace.jsonl", b"{}\n[]\n", "line 1"),
        ("trace.jsonl", b"7\n", "line 1"),
        (
            "trace.jsonl",
            b'{"timestamp": 1, "input_length": -5, "output_length": 1, "hash_ids": []}',
            "line 1",
        ),
        ("trace.jsonl", b"\xff\xfe", "is not text"),
        ("trace.jsonl", b"", "has no requests"),
        ("trace.csv", b"a,b\n1,2\n", "line 2"),
        ("trace.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2"),
        ("trace.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,x,2\n", "line 2"),
    ],
)
def test_a_wrong_trace_gets_one_line(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    result = run("--trace", str(file))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert complaint in result.stderr
    assert str(file) in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trace", "no/such/file"),
        ("--trace", "/"),
        ("--trace", "synthetic:moon"),
        ("--model", "no/such/model"),
        ("--gpu", "h9000"),
        ("--kv-format", "int5"),
        ("--policy", "best"),
        ("--rate", "0"),
        ("--inject-long", "many"),
        ("--gpu", "l4", "--model", "llama-3-70b"),
    ],
)
def test_a_wrong_option_gets_one_line(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--limit", "5")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
