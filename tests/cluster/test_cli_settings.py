"""Commands that read settings: their flags, `--set`, and `kvmesh config`."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import yaml
from typer.testing import Result

from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.cluster.cli.settings_options import FLAGS, ServeSettings
from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.config_text import default_yaml, json_schema
from kvmesh.cluster.telemetry import gpus
from kvmesh.workers.settings import paths_of
from tests.in_process import run_kvmesh
from tests.repo.imports import ROOT

SETTINGS_PAGE = (ROOT / "docs/configuration.md").read_text("utf-8")


def run(*arguments: str, **environ: str) -> Result:
    return run_kvmesh(arguments, env={"COLUMNS": "80", "TERM": "dumb", **environ})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kvmesh.yaml"
    path.write_text("engine:\n  kv_format: int8\n  tp: 2\ngroups: 2\n", encoding="utf-8")
    return path


def test_a_flag_is_another_name_of_a_setting() -> None:
    known = {".".join(path) for path in paths_of(ClusterConfig)}
    hints = typing.get_type_hints(ServeSettings, include_extras=True)
    assert hints.keys() == {*FLAGS, "config", "sets"}
    for field, setting in FLAGS.items():
        assert setting in known
        (option,) = hints[field].__metadata__
        assert f"({setting})" in option.help
        assert f"| `--{field.replace('_', '-')}` | `{setting}` |" in SETTINGS_PAGE


def test_the_defaults_are_printed() -> None:
    assert run("config").stdout == default_yaml()
    assert build(json.loads(run("config", "--json").stdout)) == ClusterConfig()
    assert json.loads(run("config", "--schema").stdout) == json_schema()


def test_the_effective_settings_have_their_sources(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "local_gpu_memory", lambda _: [])
    arguments = ("--config", str(file), "--set", "engine.kv_memory_bytes=8Gi", "--tp", "3")
    environ = {"KVMESH_GROUPS": "4"}
    result = run("config", "--effective", *arguments, **environ)
    assert result.exit_code == ExitCode.DONE, result.output
    for line in (
        f"  kv_format: int8  # {file}:2",
        "  tp: 3  # --tp",
        "  kv_memory_bytes: 8589934592  # --set",
        "groups: 4  # KVMESH_GROUPS",
        "  port: 9000  # default",
        "  max_num_seqs: auto  # default; 16 here",
        "  max_num_batched_tokens: auto  # default; 512 here",
    ):
        assert f"\n{line}\n" in result.stdout
    printed = json.loads(run("config", "--effective", "--json", *arguments, **environ).stdout)
    assert printed["sources"] == {
        "engine.kv_format": f"{file}:2",
        "engine.tp": "--tp",
        "engine.kv_memory_bytes": "--set",
        "groups": "KVMESH_GROUPS",
    }
    assert printed["auto"]["engine.max_num_seqs"] == 16
    assert "engine.tp" not in printed["auto"]
    assert printed["settings"] == yaml.safe_load(result.stdout)
    # Settings that are given would otherwise be ignored.
    assert run("config", *arguments, **environ).stdout == result.stdout


def test_every_flag_arrives() -> None:
    values = {
        "model": "m",
        "kv_format": "nuq4",
        "calibration": "/file",
        "tp": 3,
        "kvp": 2,
        "kv_memory": "1Gi",
        "groups": 2,
        "layout": "auto",
        "ranks": 6,
        "context": 4096,
        "host": "0.0.0.0",
        "port": 1,
        "http_port": 2,
        "ingress": 2,
        "auth": "none",
        "address": "auto",
    }
    assert values.keys() == FLAGS.keys()
    arguments = [
        part
        for field, value in values.items()
        for part in (f"--{field.replace('_', '-')}", str(value))
    ]
    printed = json.loads(run("config", "--effective", "--json", *arguments).stdout)
    assert printed["sources"] == {
        setting: f"--{field.replace('_', '-')}" for field, setting in FLAGS.items()
    }
    for field, setting in FLAGS.items():
        node = printed["settings"]
        for part in setting.split("."):
            node = node[part]
        assert node == {"kv_memory": 1 << 30}.get(field, values[field])


def test_a_file_is_checked(file: Path) -> None:
    result = run("config", "--check", str(file))
    assert (result.exit_code, result.stdout) == (ExitCode.DONE, f"{file} is valid\n")
    result = run("config", "--check", str(file), "--json")
    assert json.loads(result.stdout) == {"file": str(file), "valid": True}


def test_all_that_is_wrong_with_a_file_is_printed(file: Path) -> None:
    file.write_text("engine: {tp: 0, kv_fromat: int8}\ngroups: true\n", encoding="utf-8")
    result = run("config", "--check", str(file))
    assert result.exit_code == ExitCode.USAGE
    assert not result.stdout
    first, *lines = result.stderr.splitlines()
    assert first == "error: 3 settings are wrong"
    assert [line.split(":")[0] for line in lines] == [
        "  engine.tp",
        "  engine.kv_fromat",
        "  groups",
    ]
    assert "did you mean engine.kv_format?" in lines[1]
    result = run("config", "--check", str(file), "--json")
    assert result.exit_code == ExitCode.USAGE and not result.stdout
    error = json.loads(result.stderr)["error"]
    assert [x["field"] for x in error["violations"]] == ["engine.tp", "engine.kv_fromat", "groups"]


@pytest.mark.parametrize("command", [("serve",), ("demo",), ("config", "--effective")])
def test_every_command_that_reads_settings_refuses_wrong_ones(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    for arguments, environ, problem in (
        (("--config", str(tmp_path / "missing")), {}, "config: cannot read"),
        (("--config", str(tmp_path)), {}, "Is a directory"),
        (("--set", "engine.tp=0"), {}, "engine.tp: must be greater than or equal to 1"),
        (("--set", "engine.tq=1"), {}, "did you mean engine.tp? (--set)"),
        ((), {"KVMESH_ENGINE__TQ": "1"}, "did you mean KVMESH_ENGINE__TP?"),
        (("--kv-format", "zip"), {}, "engine.kv_format: must be one of"),
        (("--kv-format", "k4v5"), {}, "(did you mean k4v4? `kvmesh formats` lists all)"),
    ):
        result = run(*command, *arguments, **environ)
        assert result.exit_code == ExitCode.USAGE
        assert problem in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [("--effective", "--schema"), ("--check", "a", "--schema"), ("--check", "a", "--config", "b")],
)
def test_config_does_one_thing_at_a_time(arguments: tuple[str, ...]) -> None:
    assert run("config", *arguments).exit_code == ExitCode.USAGE
