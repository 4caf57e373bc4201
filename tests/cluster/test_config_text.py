"""Settings as text: complete, and the same when they are read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.config_file import read_file
from kvmesh.cluster.config_sources import load
from kvmesh.cluster.config_text import default_yaml, effective_yaml, json_schema
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.settings import paths_of
from tests.repo.imports import ROOT

SCHEMA = ROOT / "docs/config.schema.json"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvmesh.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_read_back_as_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, default_yaml()), environ={}).config == ClusterConfig()


def test_the_defaults_show_and_document_every_setting() -> None:
    text = default_yaml()
    shown = yaml.safe_load(text)
    for path in paths_of(ClusterConfig):
        section: Any = ClusterConfig
        node = shown
        for part in path:
            info = section.model_fields[part]
            assert f"# {info.description}\n" in text
            section, node = info.annotation, node[part]


def test_the_effective_settings_read_back_and_name_their_sources(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: |\n  two\n  lines\n"
        "groups:\n- kv_format: int8\n- {}\n- tp: 3\n  kv_format: k4v4\n"
        f"auth: {{keys: [{{tenant: 'on', sha256: {'ab' * 32}}}]}}\n"
        "router: {tenants: {'1e3': {weight: 2}, 'a b: #c': {quota_bytes: 1Gi}}}\n",
    )
    loaded = load(path, environ={"KVMESH_ENGINE__TP": "1"}, sets=["engine.kv_probe=off"])
    text = effective_yaml(loaded)
    for line in (
        f"  - kv_format: int8  # {path}:5",
        f"  - {{}}  # {path}:6",
        f"    tp: 3  # {path}:7",
        "  tp: 1  # KVMESH_ENGINE__TP",
        "  kv_probe: 'off'  # --set",
        "  page_size: 64  # default",
    ):
        assert f"\n{line}\n" in text
    again = load(written(tmp_path, text), environ={})
    assert again.config == loaded.config
    # Other readers of YAML 1.1 read the same.
    assert build(yaml.safe_load(text)) == loaded.config


def test_the_committed_schema_is_that_of_the_settings() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == json_schema(), (
        "write it again: kvmesh config --schema > docs/config.schema.json"
    )


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "version: 1\ngroups: 3\nengine: {kv_memory_bytes: 8Gi, kv_format: 8}",
        "groups: [{kv_format: int8}, {kv_format: k4v4, tp: 2}]",
        "timeouts: {drain_s: 5m, request_s: null, start_s: 2.5}",
        "router: {tenants: {a: {weight: 2, quota_bytes: 1.5 GiB}}}",
        "ingress: {kv_divergence_nats: {int8: 0.1}, port: 0}",
        f"auth: {{mode: none, keys: [{{tenant: a, sha256: {'ab' * 32}}}]}}",
    ],
)
def test_editors_accept_what_is_valid(
    schema: jsonschema.Draft202012Validator, tmp_path: Path, text: str
) -> None:
    path = written(tmp_path, text)
    assert load(path, environ={})
    assert not list(schema.iter_errors(read_file(path).values))
    assert not list(schema.iter_errors(yaml.safe_load(default_yaml())))


@pytest.mark.parametrize(
    "text",
    [
        "version: 2",
        "groups: 0",
        "groups: []",
        "groups: [{kv_format: int9}]",
        "groups: [{model: m}]",
        "modle: m",
        "engine: {tp: 0}",
        "engine: {tp: true}",
        "engine: {page_size: 48}",
        "engine: {kv_memory_bytes: 8G}",
        "engine: {kv_memory_bytes: 0}",
        "engine: {max_hot_share: 1}",
        "timeouts: {drain_s: 5 fortnights}",
        "ingress: {port: 65536}",
        "auth: {mode: maybe}",
        "auth: {keys: [{tenant: a/b, sha256: beef}]}",
        "ray: {dashboard: 1}",
    ],
)
def test_editors_refuse_what_is_refused(
    schema: jsonschema.Draft202012Validator, tmp_path: Path, text: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError):
        load(path, environ={})
    assert list(schema.iter_errors(read_file(path).values))
