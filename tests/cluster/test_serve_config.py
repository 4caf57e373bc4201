"""The configuration of Serve, and the builder that it names, without a Ray cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from kvmesh.cluster.config import AuthSection, ClusterConfig, build
from kvmesh.cluster.config_sources import load
from kvmesh.cluster.config_text import block_yaml, changed
from kvmesh.cluster.deployment import _others, check_running
from kvmesh.cluster.errors import StartError
from kvmesh.cluster.lifecycle import Cluster
from kvmesh.cluster.serve_config import SERVICER, anywhere, behind_proxy, for_nodes, serve_config
from kvmesh.workers.errors import ConfigError, ConfigErrors
from tests.in_process import run_kvmesh
from tests.model.small import make_small_model

# Ray's own, at its import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

HASH = "ab" * 32
KEYS = {"keys": [{"tenant": "a", "sha256": HASH}]}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"model": "owner/name", "engine": {"tp": 2, "kv_format": "k4v4"}, "groups": 3, "auth": KEYS},
    {"groups": [{"kv_format": "int8"}, {}, {"tp": 1}], "engine": {"kv_memory_bytes": "1GiB"}},
    {
        "auth": {"key_directory": "/keys"},
        "router": {"tenants": {"a": {"weight": 2, "quota_bytes": "1GiB"}}},
        "ingress": {"kv_divergence_nats": {"k4v4": 0.25}},
        "timeouts": {"request_s": "1h"},
    },
]


def arguments(config: ClusterConfig) -> dict[str, Any]:
    found: dict[str, Any] = serve_config(config)["applications"][0]["args"]
    return found


@pytest.mark.parametrize("values", SETTINGS)
def test_the_builder_gets_the_same_settings(values: dict[str, Any]) -> None:
    config = build(values)
    assert build(changed(config)) == config
    assert build(arguments(config)) == config
    assert build(yaml.safe_load(block_yaml(serve_config(config)))["applications"][0]["args"])


def test_serve_is_scaled_by_the_router_only_where_groups_come_and_go() -> None:
    fixed, scaled = ({"groups": 3}, {"groups": 3, "autoscaling": {"min_groups": 2}})
    assert "external_scaler_enabled" not in serve_config(build(fixed))["applications"][0]
    assert serve_config(build(scaled))["applications"][0]["external_scaler_enabled"] is True
    assert [*build(scaled).first_groups()] == ["engine-0", "engine-1"]
    assert [*build(fixed).first_groups()] == ["engine-0", "engine-1", "engine-2"]


def test_only_what_was_set_is_printed() -> None:
    assert changed(build({})) == {}
    assert changed(build(SETTINGS[3])) == {
        "auth": {"key_directory": "/keys"},
        "router": {"tenants": {"a": {"weight": 2.0, "quota_bytes": 1 << 30}}},
        "ingress": {"kv_divergence_nats": {"k4v4": 0.25}},
        "timeouts": {"request_s": 3600.0},
    }


def test_settings_of_the_program_that_starts_a_cluster_are_not_the_applications() -> None:
    config = build({"ray": {"address": "auto"}, "metrics": {"port": 8080}, "groups": 2})
    assert arguments(config) == {"groups": 2, "metrics": {}}
    named = build({"metrics": {"port": 8080, "tenants": 3}})
    assert arguments(named) == {"metrics": {"tenants": 3}}
    assert build(arguments(config)) == build({"groups": 2})


def test_ray_accepts_it() -> None:
    from ray.serve.schema import ServeDeploySchema

    values = serve_config(build({"ingress": {"host": "0.0.0.0", "http_port": 8001, "port": 9001}}))
    deployed = ServeDeploySchema.model_validate(values)
    assert (deployed.http_options.host, deployed.http_options.port) == ("0.0.0.0", 8001)
    assert (deployed.grpc_options.port, deployed.grpc_options.enable_reflection) == (9001, False)
    known = deployed.model_dump(exclude_unset=True)
    assert set(known["applications"][0]) == set(values["applications"][0])


def test_on_one_host_only_the_proxy_listens_for_clients() -> None:
    config = build({"ingress": {"host": "0.0.0.0", "http_port": 8001, "port": 9001}})
    options = serve_config(behind_proxy(config))["http_options"]
    assert options == {"host": "127.0.0.1", "port": 8001}


def test_proxies_of_nodes_can_be_found() -> None:
    def ingress_of(**variables: str) -> tuple[str, int, int]:
        found = for_nodes(load(environ=variables).config).ingress
        return found.host, found.port, found.http_port

    assert ingress_of() == ("0.0.0.0", 9000, 8000)
    assert ingress_of(KVMESH_INGRESS__HOST="127.0.0.1", KVMESH_INGRESS__PORT="0") == (
        "127.0.0.1",
        9000,
        8000,
    )
    assert ingress_of(KVMESH_INGRESS__PORT="9100", KVMESH_INGRESS__HTTP_PORT="8100")[1:] == (
        9100,
        8100,
    )


def test_a_cluster_of_nodes_that_is_joined_listens_as_one_that_is_deployed(tmp_path: Path) -> None:
    model = make_small_model("LlamaForCausalLM", tmp_path, num_hidden_layers=1)
    settings: dict[str, Any] = {"model": str(model), "auth": {"mode": "none"}}
    joined = Cluster(build({**settings, "ray": {"address": "auto"}, "ingress": {"port": 0}}))
    deployed = for_nodes(build({**settings, "ingress": {"port": 0}}))
    assert joined._prepare().ingress == deployed.ingress
    assert (deployed.ingress.host, deployed.ingress.port) == ("0.0.0.0", 9000)


def test_paths_and_the_local_key_are_valid_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    engine = {"kv_format": "nuq4", "calibration": "c.safetensors"}
    config = build({"model": "model", "engine": engine, "groups": [{"calibration": "d"}, {}]})
    found = anywhere(config, {"XDG_CONFIG_HOME": str(tmp_path)})
    assert found.model == str(tmp_path / "model")
    assert found.engine.calibration == str(tmp_path / "c.safetensors")
    assert isinstance(found.groups, tuple)
    assert [group.calibration for group in found.groups] == [str(tmp_path / "d"), None]
    assert found.group_engines()["engine-1"].calibration == str(tmp_path / "c.safetensors")
    (key,) = found.auth.keys
    assert (key.tenant, key.admin) == ("local", True)
    assert build(arguments(found)) == found
    configured = build({"auth": {"key_directory": "k"}})
    assert anywhere(configured, {}).auth == AuthSection(key_directory=tmp_path / "k")
    assert anywhere(build({"auth": {"mode": "none"}}), {}) == build({"auth": {"mode": "none"}})


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({}, {"auth.keys"}),
        ({"engine": {"tp": 0}, "groups": "x", "auth": KEYS}, {"engine.tp", "groups"}),
    ],
)
def test_the_builder_names_what_is_wrong(values: dict[str, Any], fields: set[str]) -> None:
    from kvmesh.cluster.app import build as builder

    with pytest.raises(ConfigError) as caught:
        builder(values)
    error = caught.value
    problems = error.problems if isinstance(error, ConfigErrors) else (error,)
    assert {problem.field for problem in problems} == fields


def test_the_builder_pins_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that Serve starts later have the weights of those that run."""
    from kvmesh.cluster import app

    monkeypatch.setattr(app, "pinned", lambda model: f"{model}@commit")
    monkeypatch.setattr("ray.cluster_resources", dict)
    bound: Any = app.build({"model": "owner/name", "groups": 2, "auth": KEYS})
    _, engines, deployed = bound._bound_deployment.init_args
    assert deployed.config.model == "owner/name@commit"
    configs = [engine._bound_deployment.init_args[1] for engine in engines.values()]
    assert [config.model for config in configs] == ["owner/name@commit"] * 2


def test_other_applications_stay() -> None:
    def deployed(source: str) -> dict[str, Any]:
        return {"source": source, "deployed_app_config": {"import_path": f"{source}:app"}}

    details = {
        "applications": {
            "kvmesh": deployed("declarative"),
            "theirs": deployed("declarative"),
            "by hand": deployed("imperative"),
            "being deleted": {"source": "declarative", "deployed_app_config": None},
        }
    }
    assert _others(details) == [{"import_path": "declarative:app"}]


def serve_that_runs(
    monkeypatch: pytest.MonkeyPatch, http: dict[str, Any], grpc: dict[str, Any]
) -> dict[str, Any]:
    """What a start without settings wants, where Serve has it but for these options."""
    from ray.serve import context
    from ray.serve.config import HTTPOptions

    wanted = serve_config(for_nodes(build({"auth": KEYS})))
    client = SimpleNamespace(
        http_config=HTTPOptions(**wanted["http_options"] | http),
        get_serve_details=lambda: {"grpc_options": wanted["grpc_options"] | grpc},
    )
    monkeypatch.setattr(context, "_get_global_client", lambda **_: client)
    return wanted


@pytest.mark.parametrize(
    ("http", "grpc", "said"),
    [
        ({"port": 8001}, {}, ["its ingress.http_port is 8001, not 8000"]),
        (
            {"host": "127.0.0.1"},
            {"port": 9001},
            ["its ingress.host is 127.0.0.1, not 0.0.0.0", "its ingress.port is 9001, not 9000"],
        ),
        ({}, {"grpc_servicer_functions": []}, ["it does not serve kvmesh's gRPC calls"]),
        ({}, {"enable_reflection": True}, ["its gRPC reflection answers callers without a key"]),
    ],
)
def test_a_serve_that_runs_with_other_options_is_refused(
    monkeypatch: pytest.MonkeyPatch, http: dict[str, Any], grpc: dict[str, Any], said: list[str]
) -> None:
    wanted = serve_that_runs(monkeypatch, http, grpc)
    with pytest.raises(StartError) as caught:
        check_running(wanted)
    assert f"already, and {'; '.join(said)}: set what it has" in str(caught.value)


def test_a_serve_that_has_what_is_needed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"grpc_servicer_functions": ["theirs.add_to_server", SERVICER]}
    check_running(serve_that_runs(monkeypatch, {"request_timeout_s": 9}, both))
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda **_: None)
    check_running(serve_config(for_nodes(build({"auth": KEYS}))))


def test_the_command_prints_it() -> None:
    environ = {"KVMESH_AUTH__MODE": "none", "KVMESH_GROUPS": "2"}
    printed = run_kvmesh(["config", "--serve"], env=environ)
    expected = for_nodes(load(environ=environ).config)
    assert yaml.safe_load(printed.stdout) == serve_config(expected)
    both = run_kvmesh(["config", "--serve", "--schema"])
    assert both.exit_code == 2


def test_a_layout_that_is_not_chosen_is_not_deployed() -> None:
    """Serve would be given one group on one GPU, with no word of it."""
    printed = run_kvmesh(["config", "--serve", "--layout", "auto"])
    assert printed.exit_code != 0 and printed.stdout == ""
    with pytest.raises(ConfigError, match="is auto only for `kvmesh serve`"):
        serve_config(for_nodes(build({"layout": {"mode": "auto"}})))


def test_the_variables_of_nodes_are_for_a_shell(tmp_path: Path) -> None:
    size = {"KVMESH_INGRESS__MAX_REQUEST_BYTES": "1MiB", "XDG_STATE_HOME": str(tmp_path)}
    printed = run_kvmesh(["config", "--variables"], env=size).stdout
    shell = f"{printed}\necho $RAY_SERVE_ENABLE_HA_PROXY $RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"
    assert subprocess.check_output(["sh", "-c", shell], text=True) == "1 2097152\n"


def test_a_node_runs_haproxy_by_the_launcher(tmp_path: Path) -> None:
    """As a local cluster and the image do: without it, pages of statistics are open to everyone."""
    home = tmp_path / "with space"
    environ = {"XDG_STATE_HOME": str(home)}
    for _ in range(2):
        printed = run_kvmesh(["config", "--variables"], env=environ).stdout
    (tmp_path / "haproxy.cfg").write_text("frontend stats\n    bind *:8404\n")
    run = f'{printed}\n"$RAY_SERVE_HAPROXY_BINARY_PATH" -c -f haproxy.cfg'
    subprocess.run(["sh", "-c", run], cwd=tmp_path, check=False, capture_output=True)
    assert "bind 127.0.0.1:8404" in (tmp_path / "haproxy.cfg").read_text()
    assert len(list(home.rglob("haproxy-*"))) == 1, "it stays where it is"
