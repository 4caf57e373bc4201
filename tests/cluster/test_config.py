"""The YAML configuration: documented, strict, and with every setting of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from kvmesh.cluster.config import (
    ClusterConfig,
    EngineSection,
    TenantKey,
    TenantSection,
    build,
    default_yaml,
    load,
)
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.workers.config import PAGE_SIZES, EngineConfig
from kvmesh.workers.errors import ConfigError

HASH = "ab" * 32


def sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield "", model
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            for path, inner in sections(info.annotation):
                yield f"{name}.{path}" if path else name, inner


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvmesh.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(values: dict[str, object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(values)
    return caught.value


def test_every_field_is_documented() -> None:
    documented = list(sections(ClusterConfig))
    documented.append(("auth.keys", TenantKey))
    documented.append(("router.tenants", TenantSection))
    for path, section in documented:
        assert section.__doc__, path
        for name, info in section.model_fields.items():
            assert info.description, f"{path}.{name}"


def test_the_engine_section_has_every_setting_of_an_engine() -> None:
    section = EngineSection.model_fields.keys() - {"cpus_per_rank"}
    assert section == EngineConfig.model_fields.keys() - {"model"}


def test_every_engine_setting_reaches_the_engine() -> None:
    values = {
        "kv_format": "nuq4",
        "calibration": "/there/nuq4.safetensors",
        "page_size": 32,
        "sink_pages": 2,
        "recent_pages": 3,
        "dtype": "float32",
        "device": "cpu",
        "tp": 3,
        "kv_memory_bytes": "64MiB",
        "gpu_memory_utilization": 0.5,
        "max_num_seqs": 7,
        "max_hot_share": 0.7,
        "max_num_batched_tokens": 99,
        "max_model_len": 1000,
        "prefix_cache": False,
        "threads_per_rank": 2,
        "cuda_graphs": True,
        "step_timeout_s": 3.0,
        "kv_probe": "refuse",
    }
    built = build({"model": "m", "engine": values}).engine_config()
    assert built.model_dump() == {**values, "model": "m", "kv_memory_bytes": 64 << 20}


def test_a_calibration_file_is_found_from_every_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    engine = {"kv_format": "nuq4", "calibration": "there/file"}
    assert build({"model": "m", "engine": engine}).engine_config().calibration == "/there/file"
    assert refused({"model": "m", "engine": {"kv_format": "nuq4"}}).field == "engine.calibration"


@pytest.mark.parametrize("path", [path for path, _ in sections(ClusterConfig)])
def test_an_unknown_field_is_refused_by_its_path(path: str) -> None:
    values: dict[str, object] = {"no_such": 1}
    for part in reversed(path.split(".") if path else []):
        values = {part: values}
    error = refused(values)
    assert error.field == (f"{path}.no_such" if path else "no_such")
    assert "is not a setting" in error.message


def test_the_default_yaml_reads_back_as_the_default(tmp_path: Path) -> None:
    assert load(written(tmp_path, default_yaml())) == ClusterConfig()
    assert load(None) == ClusterConfig()


def test_the_default_yaml_shows_and_documents_every_field() -> None:
    text = default_yaml()
    shown = yaml.safe_load(text)
    for path, section in sections(ClusterConfig):
        node = shown
        for part in path.split(".") if path else []:
            node = node[part]
        assert set(node) == set(section.model_fields)
        for info in section.model_fields.values():
            assert f"# {info.description}\n" in text


@pytest.mark.parametrize("page_size", [*PAGE_SIZES, 8, 0, 48, 512])
def test_page_sizes(page_size: int) -> None:
    if page_size in PAGE_SIZES:
        assert build({"engine": {"page_size": page_size}}).engine.page_size == page_size
    else:
        assert refused({"engine": {"page_size": page_size}}).field == "engine.page_size"


def test_the_documented_page_sizes_are_the_supported_ones() -> None:
    description = EngineSection.model_fields["page_size"].description
    assert description is not None
    assert description.endswith(", ".join(str(size) for size in PAGE_SIZES))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"model": ""}, "model"),
        ({"groups": 0}, "groups"),
        ({"groups": "many"}, "groups"),
        ({"engine": {"kv_format": "int9"}}, "engine.kv_format"),
        ({"engine": {"tp": 0}}, "engine.tp"),
        ({"engine": {"dtype": "float64"}}, "engine.dtype"),
        ({"engine": {"sink_pages": -1}}, "engine.sink_pages"),
        ({"engine": {"kv_memory_bytes": "12 parsecs"}}, "engine.kv_memory_bytes"),
        ({"engine": {"kv_memory_bytes": 0}}, "engine.kv_memory_bytes"),
        ({"engine": {"gpu_memory_utilization": 1.5}}, "engine.gpu_memory_utilization"),
        ({"engine": {"gpu_memory_utilization": float("nan")}}, "engine.gpu_memory_utilization"),
        (
            {"engine": {"max_num_seqs": 64, "max_num_batched_tokens": 32}},
            "engine.max_num_batched_tokens",
        ),
        ({"engine": 3}, "engine"),
        ({"ingress": {"port": 65536}}, "ingress.port"),
        ({"ingress": {"max_request_bytes": "1.5.2MiB"}}, "ingress.max_request_bytes"),
        ({"auth": {"mode": "maybe"}}, "auth.mode"),
        ({"auth": {"keys": [{"tenant": "a"}]}}, "auth.keys.0.sha256"),
        ({"auth": {"keys": [{"tenant": "a", "sha256": "beef"}]}}, "auth.keys.0.sha256"),
        ({"auth": {"keys": [{"tenant": "", "sha256": HASH}]}}, "auth.keys.0.tenant"),
        ({"auth": {"keys": [{"tenant": "a/b", "sha256": HASH}]}}, "auth.keys.0.tenant"),
        ({"router": {"queue_timeout_s": float("inf")}}, "router.queue_timeout_s"),
        ({"timeouts": {"drain_s": 0}}, "timeouts.drain_s"),
    ],
)
def test_a_wrong_value_is_refused_by_its_path(values: dict[str, object], field: str) -> None:
    error = refused(values)
    assert error.field == field
    assert error.message
    assert "pydantic" not in str(error)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("512MiB", 512 << 20), ("8GB", 8 * 10**9), ("1.5 KiB", 1536), ("7", 7), ("3b", 3)],
)
def test_bytes_may_have_a_unit(text: str, size_bytes: int) -> None:
    assert build({"engine": {"kv_memory_bytes": text}}).engine.kv_memory_bytes == size_bytes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": {"tp": 0}}, "must be greater than or equal to 1, got 0"),
        ({"engine": {"page_size": 8}}, "must be one of 16, 32, 64, 128, 256, got 8"),
        ({"engine": {"dtype": "half"}}, "must be 'auto', 'float32' or 'bfloat16', got 'half'"),
        (
            {"ingress": {"max_request_bytes": "16 MB."}},
            "must be a number of bytes, or one with a unit",
        ),
        ({"model": ""}, "must have at least 1 character, got ''"),
    ],
)
def test_a_wrong_value_is_explained(values: dict[str, object], message: str) -> None:
    assert refused(values).message.startswith(message)


def test_tenants_have_weights_and_quotas() -> None:
    config = build({"router": {"tenants": {"a": {"quota_bytes": "2GiB"}, "b": {"weight": 3}}}})
    assert config.router.policies() == {
        "a": TenantPolicy(1.0, 2 << 30),
        "b": TenantPolicy(3.0, None),
    }
    error = refused({"router": {"tenants": {"a": {"weight": 0}}}})
    assert error.field == "router.tenants.a.weight"


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ClusterConfig().groups = 2


def test_overrides_take_precedence_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "groups: 2\nengine:\n  tp: 3\n  page_size: 32\n")
    overrides = {"engine.tp": 1, "ingress.port": 1234, "groups": None}
    config = load(path, overrides)
    assert (config.groups, config.engine.tp, config.engine.page_size) == (2, 1, 32)
    assert config.ingress.port == 1234


def test_an_override_below_a_value_names_the_whole_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, "engine: fast\n"), {"engine.tp": 1})
    assert caught.value.field == "engine"


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n- 2\n", "just text", "groups: 1\ngroups : {", "\t- tab"]
)
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=str(path)) as caught:
        load(path)
    assert caught.value.field == "config"


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "missing.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(path)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load(written(tmp_path, "# nothing set\n")) == ClusterConfig()
