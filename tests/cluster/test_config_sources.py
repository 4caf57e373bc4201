"""Where settings come from: which source counts, under which name, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.config_sources import DEFAULT, VARIABLES, Flag, LoadedConfig, load
from kvmesh.workers.errors import ConfigError, ConfigErrors
from kvmesh.workers.settings import paths_of


class Sources:
    """Loads settings from a file with this text, and from the others."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "kvmesh.yaml"

    def load(
        self,
        text: str = "",
        environ: Mapping[str, str] | None = None,
        sets: Sequence[str] = (),
        flags: Sequence[Flag] = (),
    ) -> LoadedConfig:
        self.path.write_text(text, encoding="utf-8")
        return load(self.path, environ=environ or {}, sets=sets, flags=flags)

    def problems(self, text: str = "", **others: object) -> dict[str, str]:
        with pytest.raises(ConfigError) as caught:
            self.load(text, **others)  # type: ignore[arg-type]
        error = caught.value
        found = error.problems if isinstance(error, ConfigErrors) else (error,)
        return {problem.field: problem.message for problem in found}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


def test_without_sources_there_are_the_defaults() -> None:
    loaded = load(environ={"PATH": "/bin", "KVMESH_TARGET": "host:1"})
    assert loaded.config == ClusterConfig()
    assert loaded.source(("engine", "tp")) == DEFAULT


def test_flags_override_set_which_overrides_the_environment_which_overrides_the_file(
    sources: Sources,
) -> None:
    text = "engine:\n  tp: 1\n  page_size: 32\n"
    environ = {"KVMESH_ENGINE__TP": "2"}
    flags: list[Flag] = [("--tp", "engine.tp", 4), ("--groups", "groups", None)]
    name = ("engine", "tp")
    steps = [
        (sources.load(text), 1, f"{sources.path}:2"),
        (sources.load(text, environ), 2, "KVMESH_ENGINE__TP"),
        (sources.load(text, environ, ["engine.tp=3", "engine.tp=5"]), 5, "--set"),
        (sources.load(text, environ, ["engine.tp=3"], flags), 4, "--tp"),
    ]
    for loaded, tp, source in steps:
        assert (loaded.config.engine.tp, loaded.source(name)) == (tp, source)
        # What a source does not set is what those before it set.
        assert loaded.config.engine.page_size == 32
        assert loaded.source(("engine", "page_size")) == f"{sources.path}:3"


def test_every_setting_but_the_version_has_a_variable() -> None:
    names = {"KVMESH_" + "__".join(path).upper() for path in paths_of(ClusterConfig)}
    assert names - VARIABLES.keys() == {"KVMESH_VERSION"}
    assert VARIABLES["KVMESH_ENGINE__KV_MEMORY_BYTES"] == ("engine", "kv_memory_bytes")


def test_values_of_every_kind(sources: Sources) -> None:
    environ = {
        "KVMESH_MODEL": "123",
        "KVMESH_GROUPS": "3",
        "KVMESH_ENGINE__KV_MEMORY_BYTES": "8Gi",
        "KVMESH_ENGINE__PREFIX_CACHE": "false",
        "KVMESH_ENGINE__KV_PROBE": "off",
        "KVMESH_TIMEOUTS__DRAIN_S": "5m",
        "KVMESH_TIMEOUTS__REQUEST_S": "null",
        "KVMESH_AUTH__MODE": "none",
        "KVMESH_ROUTER__TENANTS": "{a: {weight: 2}}",
        "KVMESH_ROUTER__TENANTS__Bob__WEIGHT": "3",
        "KVMESH_INGRESS__KV_DIVERGENCE_NATS__int8": "0.5",
        "KVMESH_METRICS__PORT": "",  # as if it were not there
    }
    config = sources.load("timeouts: {request_s: 7}", environ).config
    assert (config.model, config.groups, config.engine.kv_memory_bytes) == ("123", 3, 8 << 30)
    assert (config.engine.prefix_cache, config.engine.kv_probe) == (False, "off")
    assert (config.timeouts.drain_s, config.timeouts.request_s) == (300.0, None)
    assert config.auth.mode == "none"
    assert {name: x.weight for name, x in config.router.tenants.items()} == {"a": 2.0, "Bob": 3.0}
    assert config.ingress.kv_divergence_nats == {"int8": 0.5}


def test_mappings_are_merged_and_lists_are_replaced(sources: Sources) -> None:
    text = (
        "router: {tenants: {a: {weight: 2}, b: {weight: 3}}}\n"
        "groups: [{kv_format: int8}, {kv_format: k4v4}]\n"
        "engine:\n"
    )
    config = sources.load(text, sets=["router.tenants.a.weight=5", "engine={tp: 3}"]).config
    assert {name: x.weight for name, x in config.router.tenants.items()} == {"a": 5.0, "b": 3.0}
    assert config.engine.tp == 3
    assert len(config.group_engines()) == 2
    assert not sources.load(text, sets=["router.tenants={}"]).config.router.tenants
    assert sources.load(text, sets=["groups=[{tp: 3}]"]).config.group_engines()["engine-0"].tp == 3


def test_an_entry_of_a_list_can_be_changed(sources: Sources) -> None:
    text = "groups:\n- kv_format: int8\n- kv_format: k4v4\n"
    loaded = sources.load(text, {"KVMESH_GROUPS__1__KV_FORMAT": "int4"}, ["groups.0.tp=3"])
    engines = loaded.config.group_engines()
    assert [(x.kv_format, x.tp) for x in engines.values()] == [("int8", 3), ("int4", 1)]
    assert loaded.source(("groups", "0", "kv_format")) == f"{sources.path}:2"
    assert loaded.source(("groups", "0", "tp")) == "--set"
    assert loaded.source(("groups", "1", "kv_format")) == "KVMESH_GROUPS__1__KV_FORMAT"
    assert "has no entry '2'" in sources.problems(text, sets=["groups.2.tp=3"])["groups"]
    assert "has no entry '0'" in sources.problems("groups: 2", sets=["groups.0.tp=3"])["groups"]


def test_problems_of_all_sources_are_reported_at_once_with_their_source(sources: Sources) -> None:
    found = sources.problems(
        "engine:\n  tp: 0\nmodle: m\nengine: {}\n",
        environ={"KVMESH_ENGINE__KV_FROMAT": "int8", "KVMESH_ENGINE__MAX_NUM_SEQS": "many"},
        sets=["engine.kv_memory_bytes=8G", "nonsense", "ingress.prot=1"],
        flags=[("--port", "ingress.port", 65536)],
    )
    assert found.keys() == {
        "engine",
        "engine.tp",
        "modle",
        "KVMESH_ENGINE__KV_FROMAT",
        "engine.max_num_seqs",
        "engine.kv_memory_bytes",
        "--set",
        "ingress.prot",
        "ingress.port",
    }
    assert found["engine"] == f"is set twice in {sources.path}, on line 1 and on line 4"
    assert found["engine.tp"].endswith(f"got 0 ({sources.path}:2)")
    assert found["modle"] == f"is not a setting; did you mean model? ({sources.path}:3)"
    assert found["KVMESH_ENGINE__KV_FROMAT"].endswith("did you mean KVMESH_ENGINE__KV_FORMAT?")
    assert found["engine.max_num_seqs"].endswith("got 'many' (KVMESH_ENGINE__MAX_NUM_SEQS)")
    assert "KiB" in found["engine.kv_memory_bytes"]
    assert found["engine.kv_memory_bytes"].endswith("got '8G' (--set)")
    assert found["--set"] == "must be SETTING=VALUE, e.g. engine.tp=2; got 'nonsense'"
    assert found["ingress.prot"] == "is not a setting; did you mean ingress.port? (--set)"
    assert found["ingress.port"].endswith("got 65536 (--port)")


@pytest.mark.parametrize("name", ["KVMESH_NO_SUCH__SETTING", "KVMESH_engine__tp", "KVMESH__X"])
def test_an_unknown_variable_is_refused(sources: Sources, name: str) -> None:
    assert sources.problems(environ={name: "1"})[name].startswith("is not a setting; ")


def test_other_variables_are_none_of_our_business(sources: Sources) -> None:
    # The last ones are how Kubernetes describes a service named kvmesh-ingress.
    environ = {
        "KVMESH_TARGET": "x",
        "KVMESH_API_KEY": "x",
        "KVMESH_VERSION": "0.1.0",
        "OTHER_ENGINE__TP": "2",
        "KVMESH_INGRESS_PORT": "tcp://10.0.0.1:9000",
        "KVMESH_INGRESS_SERVICE_HOST": "10.0.0.1",
    }
    assert sources.load(environ=environ).config == ClusterConfig()


@pytest.mark.parametrize("argument", ["", "=", "=3", "engine.tp"])
def test_an_argument_that_sets_nothing_is_refused(sources: Sources, argument: str) -> None:
    assert "must be SETTING=VALUE" in sources.problems(sets=[argument])["--set"]


def test_a_setting_below_a_value_is_refused(sources: Sources) -> None:
    flags = [("--tp", "engine.tp", 1)]
    assert sources.problems("engine: fast\n", flags=flags) == {
        "engine": "has no entry 'tp': it is 'fast'"
    }
    assert sources.problems(sets=["engine={"])["engine"].endswith("(--set)")
