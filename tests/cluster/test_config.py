"""The settings of a cluster: documented, strict, and with every setting of the engine."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from kvmesh.cluster.config import (
    MAX_GROUPS,
    SAME_IN_ALL_GROUPS,
    ClusterConfig,
    EngineSection,
    GroupSection,
    TenantKey,
    TenantSection,
    build,
)
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.workers.config import PAGE_SIZES, EngineConfig
from kvmesh.workers.errors import ConfigError, ConfigErrors
from kvmesh.workers.rope_override import RopeOverride

HASH = "ab" * 32


def sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield "", model
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            for path, inner in sections(info.annotation):
                yield f"{name}.{path}" if path else name, inner


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
        "kvp": 2,
        "kv_memory_bytes": "64MiB",
        "gpu_memory_utilization": 0.5,
        "max_num_seqs": 7,
        "max_hot_share": 0.7,
        "max_num_batched_tokens": 99,
        "max_model_len": 1000,
        "max_pinned_share": 0.6,
        "max_pinned_share_per_key": 0.3,
        "prefix_cache": False,
        "threads_per_rank": 2,
        "cuda_graphs": False,
        "max_step_s": 0.2,
        "step_timeout_s": 3.0,
        "kv_probe": "refuse",
        "weight_format": "int8",
        "rope": RopeOverride(type="linear", factor=2.0).model_dump(),
        "expert_parallel": True,
        "deterministic": False,
    }
    built = build({"model": "m", "engine": values}).engine_config()
    assert built.model_dump() == {**values, "model": "m", "kv_memory_bytes": 64 << 20}
    # Which most of these values exclude.
    assert build({"model": "m", "engine": {"deterministic": True}}).engine_config().deterministic


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
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"groups": 0}, "groups"),
        ({"groups": "many"}, "groups"),
        ({"groups": True}, "groups"),
        ({"groups": 1.5}, "groups"),
        ({"groups": []}, "groups"),
        ({"groups": [{}] * (MAX_GROUPS + 1)}, "groups"),
        ({"groups": {"kv_format": "int8"}}, "groups"),
        ({"groups": [3]}, "groups.0"),
        ({"groups": [{}, {"tp": 0}]}, "groups.1.tp"),
        ({"groups": [{"model": "m"}]}, "groups.0.model"),
        ({"engine": {"tp": True}}, "engine.tp"),
        ({"engine": {"kv_memory_bytes": True}}, "engine.kv_memory_bytes"),
        ({"engine": {"gpu_memory_utilization": True}}, "engine.gpu_memory_utilization"),
        ({"engine": {"prefix_cache": 1}}, "engine.prefix_cache"),
        ({"engine": {"kv_format": True}}, "engine.kv_format"),
        ({"ray": {"dashboard": "perhaps"}}, "ray.dashboard"),
        ({"timeouts": {"drain_s": True}}, "timeouts.drain_s"),
        ({"timeouts": {"drain_s": "5 fortnights"}}, "timeouts.drain_s"),
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
        *(({"ingress": {"host": x}}, "ingress.host") for x in ("::1", "[::1]", "h:1", "*", "")),
        ({"ingress": {"max_request_bytes": "1.5.2MiB"}}, "ingress.max_request_bytes"),
        ({"auth": {"mode": "maybe"}}, "auth.mode"),
        ({"auth": {"key_file": 3}}, "auth.key_file"),
        ({"auth": {"keys": 3}}, "auth.keys"),
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
            "must be a whole number of bytes, or one with a unit",
        ),
        (
            {"ingress": {"host": "::"}},
            "must be an IPv4 address or a name, without a port; 0.0.0.0 for all interfaces",
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


def test_a_numeric_alias_names_a_format() -> None:
    assert build({"engine": {"kv_format": 8}}).engine.kv_format == "8"


def test_everything_that_is_wrong_is_reported_at_once() -> None:
    error = refused(
        {
            "modle": "m",
            "engine": {"tp": True, "page_szie": 32},
            "ingress": {"port": -1},
            "router": {"tenants": {"a": {"wieght": 2}}},
            "auth": {"keys": [{"tenant": "a/b"}]},
        }
    )
    assert isinstance(error, ConfigErrors)
    assert {problem.field: problem.message for problem in error.problems} == {
        "engine.tp": "must be a whole number, got true",
        "engine.page_szie": "is not a setting; did you mean engine.page_size?",
        "ingress.port": "must be greater than or equal to 0, got -1",
        "auth.keys.0.tenant": "must match pattern '^[^/]+$', got 'a/b'",
        "auth.keys.0.sha256": "is required",
        "router.tenants.a.wieght": ("is not a setting; did you mean router.tenants.a.weight?"),
        "modle": "is not a setting; did you mean model?",
    }
    assert str(error).count("\n") == len(error.problems) - 1
    again = pickle.loads(pickle.dumps(error))
    assert (again.field, str(again)) == (error.field, str(error))


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("engine.kv_fromat", "engine.kv_format"),
        ("engine.KV-Format", "engine.kv_format"),
        ("kv_format", "engine.kv_format"),
        ("engine.port", "ingress.port"),
        ("ingres", "ingress"),
        ("groups.0.kv_fmt", "groups.0.kv_format"),
        ("zzz", None),
    ],
)
def test_an_unknown_name_gets_a_suggestion(path: str, suggestion: str | None) -> None:
    section, _, name = path.rpartition(".")
    values: dict[str, object] = {name: 1}
    if section == "groups.0":
        values = {"groups": [values]}
    elif section:
        values = {section: values}
    error = refused(values)
    assert error.field == path
    expected = f"did you mean {suggestion}?" if suggestion else "`kvmesh config` prints all"
    assert error.message == f"is not a setting; {expected}"


def test_a_group_overrides_the_engine() -> None:
    config = build(
        {
            "engine": {"max_num_seqs": 4, "cpus_per_rank": 0.5},
            "groups": [{"kv_format": "int8"}, {"kv_format": "k4v4", "max_num_seqs": 8}, {}],
        }
    )
    engines = config.group_engines()
    assert list(engines) == ["engine-0", "engine-1", "engine-2"]
    assert [x.kv_format for x in engines.values()] == ["int8", "k4v4", "default"]
    assert [x.max_num_seqs for x in engines.values()] == [4, 8, 4]
    assert {x.cpus_per_rank for x in engines.values()} == {0.5}
    assert config.engine_config("engine-1").kv_format == "k4v4"
    # As it goes to Ray's workers.
    assert pickle.loads(pickle.dumps(config)).group_engines() == engines
    assert list(build({"groups": 2}).group_engines()) == ["engine-0", "engine-1"]


def test_an_entry_of_groups_has_every_setting_of_the_engine() -> None:
    assert GroupSection.model_fields.keys() == EngineSection.model_fields.keys()


@pytest.mark.parametrize(("name", "value"), [("page_size", 32), ("prefix_cache", False)])
def test_what_the_router_assumes_of_all_groups_must_not_differ(name: str, value: object) -> None:
    assert name in SAME_IN_ALL_GROUPS
    error = refused({"groups": [{}, {"kv_format": "k4v4"}, {name: value}]})
    assert error.field == f"groups.2.{name}"
    assert error.message.startswith("must be the same in all groups")
    assert build({"groups": [{name: value}, {name: value}]}).group_engines()
    assert build({"engine": {name: value}, "groups": [{}, {"tp": 3}]}).group_engines()


def test_each_group_is_checked_for_what_does_not_go_together() -> None:
    engine = {"kv_format": "nuq4", "max_num_seqs": 600, "max_num_batched_tokens": 512}
    error = refused({"engine": engine, "groups": [{"kv_format": "int8"}, {"max_num_seqs": 4}]})
    assert isinstance(error, ConfigErrors)
    assert [problem.field for problem in error.problems] == [
        "groups.0.max_num_batched_tokens",
        "groups.1.calibration",
    ]
    # What each group changes need not go together before.
    assert build({"engine": engine, "groups": [{"kv_format": "int8", "max_num_seqs": 1}]})


@pytest.mark.parametrize("groups", [2, [{}, {"kv_format": "k4v4"}]])
def test_no_more_groups_can_always_run_than_there_are(groups: object) -> None:
    with pytest.raises(ConfigError, match="at most the number of groups, 2, got 3") as caught:
        build({"groups": groups, "autoscaling": {"min_groups": 3}})
    assert caught.value.field == "autoscaling.min_groups"
    assert len(build({"groups": groups, "autoscaling": {"min_groups": 2}}).first_groups()) == 2


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ClusterConfig().groups = 2
