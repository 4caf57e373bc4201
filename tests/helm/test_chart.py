"""The chart without a cluster: what it renders, what it refuses, and what broke on real ones."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dashboards.queries import CLUSTER_LABEL, RELEASE_LABELS
from kvmesh.cluster.config import build
from kvmesh.cluster.config_sources import load
from kvmesh.cluster.environment import serve_variables
from kvmesh.cluster.serve_config import for_nodes, serve_config
from kvmesh.protos import pb
from tests.client.servicer import ScriptedServicer, answering, serving
from tests.helm.tool import CHART, HelmError, objects_in, only, render, run
from tests.repo.imports import ROOT

# Ray's own, at its import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

CI = sorted((CHART / "ci").glob("*-values.yaml"))
DEFINITIONS = ROOT.parent / "shared/kubernetes"
KUBERNETES = "1.36"
KINDS = {"RayService", "PodMonitor", "PrometheusRule"}
NOT_CHECKED = {"GRPCRoute", "HTTPRoute"}  # there is no definition of them here
HASH = "0" * 64
EVERYTHING: dict[str, Any] = {
    "metrics": {
        "podMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
    }
}
ci_files = pytest.mark.parametrize("file", CI, ids=lambda file: file.stem)


@cache
def rendered(file: Path) -> list[dict[str, Any]]:
    return render(EVERYTHING, file)


def cluster_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = only(objects, "RayService")["spec"]["rayClusterConfig"]
    return found


def serve_config_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(only(objects, "RayService")["spec"]["serveConfigV2"])
    return found


def containers(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the head, then of the workers."""
    cluster = cluster_of(objects)
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [pod["template"]["spec"]["containers"][0] for pod in pods]


# Every values file


def test_lint() -> None:
    assert len(CI) == 4
    for file in CI:
        run("lint", "--strict", CHART, "--values", file)


@ci_files
def test_core_objects_are_valid(file: Path) -> None:
    checked = set()
    for found in rendered(file):
        if found["kind"] not in KINDS | NOT_CHECKED:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
            checked.add(found["kind"])
    pods = [cluster_of(rendered(file))["headGroupSpec"]]
    pods += cluster_of(rendered(file))["workerGroupSpecs"]
    for pod in pods:
        template = {"apiVersion": "v1", "kind": "Pod", **pod["template"]}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
    assert {"NetworkPolicy", "PodDisruptionBudget", "Pod", "ServiceAccount"} <= checked


def definition(kind: str) -> dict[str, Any]:
    """The JSON Schema of a custom resource."""
    group = {"RayService": "ray.io"}.get(kind, "monitoring.coreos.com")
    path = DEFINITIONS / f"{group}_{kind.lower()}s.yaml.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    (found,) = objects_in(gzip.decompress(path.read_bytes()))
    (version,) = (x for x in found["spec"]["versions"] if x["name"] == "v1")
    schema: dict[str, Any] = strict(version["schema"]["openAPIV3Schema"])
    return schema


def strict(schema: Any) -> Any:
    """With nothing allowed that is not described, and numbers where Kubernetes takes both."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(part) for key, part in schema.items()}
    described = isinstance(found.get("properties"), dict) and found.get("type") == "object"
    if described and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    if found.get("x-kubernetes-int-or-string"):
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    return found


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_custom_resources_are_valid(kind: str) -> None:
    validator = jsonschema.Draft202012Validator(definition(kind))
    seen = 0
    for file in CI:
        for found in rendered(file):
            if found["kind"] == kind:
                seen += 1
                errors = [f"{e.json_path}: {e.message[:200]}" for e in validator.iter_errors(found)]
                assert not errors, "\n".join(errors)
    rules = list((CHART / "files/alerts").glob("*.yaml"))
    assert seen == (len(CI) if kind != "PrometheusRule" or rules else 0)


@ci_files
def test_serve_is_given_what_config_prints(file: Path) -> None:
    """The same as `kvmesh config --serve` for the same settings, which a test deploys."""
    from ray.serve.schema import ServeDeploySchema

    found = serve_config_of(rendered(file))
    ServeDeploySchema.model_validate(found)
    config = build(found["applications"][0]["args"])
    expected = serve_config(for_nodes(load(environ={}).config))
    assert {k: v for k, v in found.items() if k != "applications"} == {
        k: v for k, v in expected.items() if k != "applications"
    }
    given = dict(yaml.safe_load(file.read_text("utf-8"))["config"])
    wanted = build({**given, "engine": {"device": config.engine.device, **given.get("engine", {})}})
    assert config.model_copy(update={"auth": wanted.auth}) == wanted
    assert str(config.auth.key_directory) == "/etc/kvmesh/keys"
    assert config.auth.keys == wanted.auth.keys
    (application,), (printed,) = found["applications"], serve_config(config)["applications"]
    assert {**application, "args": {}} == {**printed, "args": {}}


@ci_files
def test_every_pod_has_serves_variables(file: Path) -> None:
    config = build(serve_config_of(rendered(file))["applications"][0]["args"])
    for container in containers(rendered(file)):
        variables = {x["name"]: x.get("value") for x in container["env"]}
        assert len(variables) == len(container["env"]), "one twice"
        assert serve_variables(config).items() <= variables.items()


# What broke on a real cluster


@ci_files
def test_upgrades_by_server_side_apply_do_not_conflict(file: Path) -> None:
    """The operator writes defaults into the atomic list of worker groups; these are those."""
    groups = cluster_of(rendered(file))["workerGroupSpecs"]
    assert groups
    for group in groups:
        assert (group["numOfHosts"], group["priority"], group["scaleStrategy"]) == (1, 0, {})
        assert group["template"]["metadata"]["labels"]
        assert all(isinstance(group[f"{name}eplicas"], int) for name in ("r", "minR", "maxR"))


# Empty values that Go keeps, because its types have pointers there.
KEPT_BY_GO = {"automountServiceAccountToken", "allowPrivilegeEscalation", "priority", "emptyDir"}
KEPT_BY_GO |= {"replicas", "minReplicas", "maxReplicas", "scaleStrategy"}


@ci_files
def test_worker_groups_are_as_the_operator_would_write_them(file: Path) -> None:
    """It leaves out what is empty, and shortens quantities: the list would then be its own."""

    def check(value: Any, name: str) -> None:
        assert value or name in KEPT_BY_GO, f"{name}: {value!r}"
        if isinstance(value, dict):
            for key, inner in value.items():
                check(inner, key)
        elif isinstance(value, list):
            for inner in value:
                check(inner, name)
        elif name in ("memory", "sizeLimit"):
            assert value.endswith("Gi") and int(value[:-2]) % 1024, value

    for group in cluster_of(rendered(file))["workerGroupSpecs"]:
        check(group, "")


@ci_files
def test_ports_are_named_as_the_operator_wants(file: Path) -> None:
    spec = only(rendered(file), "RayService")["spec"]
    for container in containers(rendered(file)):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {"serve": 8000, "serve-grpc": 9000, "metrics": 8080}.items() <= ports.items()
    ports = {p["name"]: p for p in spec["serveService"]["spec"]["ports"]}
    assert ports["serve-grpc"]["appProtocol"] == "kubernetes.io/h2c"
    assert (ports["serve"]["port"], ports["serve-grpc"]["port"]) == (8000, 9000)


@ci_files
def test_the_head_needs_nothing_that_uninstalling_removes(file: Path) -> None:
    """The operator's clean-up of Redis starts a pod like the head, after the chart's objects."""
    owned = {
        found["metadata"]["name"]
        for found in rendered(file)
        if found["kind"] in ("ConfigMap", "Secret", "ServiceAccount", "PersistentVolumeClaim")
    }
    head = cluster_of(rendered(file))["headGroupSpec"]["template"]["spec"]
    assert [volume for volume in head["volumes"] if "emptyDir" not in volume] == []
    assert head.get("serviceAccountName") not in owned
    assert not owned & set(texts_in(without_optional(head)))
    workers = cluster_of(rendered(file))["workerGroupSpecs"]
    assert owned & set(texts_in(workers)), "this would find them"


def without_optional(value: Any) -> Any:
    """Without references that a pod also starts without."""
    if isinstance(value, dict):
        inner = {name: without_optional(found) for name, found in value.items()}
        return {} if value.get("optional") else inner
    return [without_optional(found) for found in value] if isinstance(value, list) else value


def texts_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_in(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    return [value] if isinstance(value, str) else []


@ci_files
def test_workers_are_ready_when_kvmesh_is_and_end_in_time(file: Path) -> None:
    config = build(serve_config_of(rendered(file))["applications"][0]["args"])
    for group in cluster_of(rendered(file))["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["readinessProbe"]["grpc"] == {"port": 9000}
        assert "livenessProbe" not in container
        *command, timeout = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["kvmesh", "drain-node", "--quiet"]
        limit_s = int(timeout.removeprefix("--timeout="))
        # Serve begins to stop a replica when what it may take is left until the deadline.
        assert config.timeouts.drain_s + 10 < limit_s < pod["terminationGracePeriodSeconds"]


@ci_files
def test_pods_have_no_rights(file: Path) -> None:
    cluster = cluster_of(rendered(file))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        context = pod["containers"][0]["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert "/tmp" in mounts


def test_two_releases_in_a_namespace_share_no_name() -> None:
    for file in CI:
        first, second = (render(EVERYTHING, file, release) for release in ("one", "two"))
        names = [{(x["kind"], x["metadata"]["name"]) for x in each} for each in (first, second)]
        assert not names[0] & names[1]
        for objects, other in ((first, "two"), (second, "one")):
            budget = only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
            assert other not in texts_in(budget)
            workers = cluster_of(objects)["workerGroupSpecs"]
            for group in workers:
                assert budget.items() <= group["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        ("kvmesh", {}, "kvmesh"),
        ("mine", {}, "mine-kvmesh"),
        ("x" * 53, {}, "x" * 47),
        ("mine", {"fullnameOverride": "other"}, "other"),
    ],
)
def test_names_leave_room_for_what_the_operator_adds(
    release: str, values: dict[str, Any], name: str
) -> None:
    objects = render(values, release=release)
    assert only(objects, "RayService")["metadata"]["name"] == name
    assert max(len(found["metadata"]["name"]) for found in objects) <= 63


@pytest.mark.parametrize("release", ["1st", "a.b"])
def test_a_name_that_the_operator_refuses_is_refused_here(release: str) -> None:
    with pytest.raises(HelmError, match="begins with a letter"):
        render(release=release)


def test_pods_do_not_change_with_the_charts_version() -> None:
    """They would be replaced, with the whole cluster, by every upgrade of the chart."""
    for group in (
        cluster_of(render())["headGroupSpec"],
        *cluster_of(render())["workerGroupSpecs"],
    ):
        labels = group["template"]["metadata"]["labels"]
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & labels.keys()


# Single values


def test_metrics_may_name_tenants() -> None:
    objects = render({"config": {"metrics": {"tenants": 3}}})
    (application,) = serve_config_of(objects)["applications"]
    assert application["args"]["metrics"] == {"tenants": 3}
    with pytest.raises(HelmError, match="port"):
        render({"config": {"metrics": {"port": 8080}}})


def test_a_change_of_settings_is_in_place_or_not() -> None:
    def cluster(change: str, seqs: int) -> dict[str, Any]:
        settings = {"engine": {"max_num_seqs": seqs}}
        return cluster_of(render({"configChange": change, "config": settings}))

    assert cluster("InPlace", 8) == cluster("InPlace", 9)
    assert cluster("NewCluster", 8) != cluster("NewCluster", 9)
    assert cluster("NewCluster", 8) == cluster("NewCluster", 8)


def test_keys_are_files_in_workers_and_nowhere_else() -> None:
    objects = render({"auth": {"keys": {"a": {"value": "secret-of-a"}, "b": {"admin": True}}}})
    secret = only(objects, "Secret")
    assert set(secret["data"]) == {"a", "b.admin", "default.admin"}
    rest = json.dumps([found for found in objects if found is not secret])
    assert "secret-of-a" not in rest and secret["data"]["b.admin"] not in rest
    (worker,) = cluster_of(objects)["workerGroupSpecs"]
    (keys,) = (v for v in worker["template"]["spec"]["volumes"] if v["name"] == "keys")
    assert keys["secret"] == {"secretName": "r-kvmesh-keys", "defaultMode": 0o440}
    existing = render({"auth": {"existingSecret": "mine"}})
    assert not [found for found in existing if found["kind"] == "Secret"]
    assert "mine" in texts_in(cluster_of(existing)["workerGroupSpecs"])


@pytest.mark.parametrize("admin", [False, True])
@pytest.mark.parametrize("entry", ["a", "a.admin"])
def test_a_generated_key_is_kept_when_its_rights_change(entry: str, admin: bool) -> None:
    """Rendering asks no cluster, so the Secret's template is given what a cluster would have."""
    values = {"a": {"value": "", "admin": admin}, "b": {"value": "set"}, "gone": None}
    kept = {entry: "dGhlIGtleQ==", "b": "b2xk", "gone": "b2xk"}
    arguments = f'(dict "keys" (fromJson `{json.dumps(values)}`)'
    arguments += f' "kept" (fromJson `{json.dumps(kept)}`))'
    entries = f'{{{{ include "kvmesh.keyEntries" {arguments} | nindent 2 }}}}'
    secret = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: made}}\ndata: {entries}\n"
    made = only(render({"extraObjects": [secret]}), "ConfigMap")["data"]
    assert made == {"a.admin" if admin else "a": "dGhlIGtleQ==", "b": "c2V0"}


def test_without_authentication_there_are_no_keys() -> None:
    objects = render({"config": {"auth": {"mode": "none"}}})
    assert not [found for found in objects if found["kind"] == "Secret"]
    assert "keys" not in texts_in(cluster_of(objects))
    assert serve_config_of(objects)["applications"][0]["args"]["auth"] == {"mode": "none"}


def test_ports_may_be_others() -> None:
    objects = render({"config": {"ingress": {"port": 9100, "http_port": 8100}}})
    assert serve_config_of(objects)["grpc_options"]["port"] == 9100
    (worker,) = cluster_of(objects)["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["readinessProbe"]["grpc"] == {"port": 9100}
    assert {"serve": 8100, "serve-grpc": 9100}.items() <= {
        port["name"]: port["containerPort"] for port in container["ports"]
    }.items()
    policy = only(objects, "NetworkPolicy")["spec"]["ingress"]
    assert {"ports": [{"port": 9100}, {"port": 8100}]} in policy


def test_each_protocol_has_ways_in_of_its_own() -> None:
    gateways = {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.example"]}
    ingress = {"enabled": True, "host": "a.example", "tlsSecret": "t"}
    objects = render(
        {
            "grpcRoute": gateways,
            "httpRoute": gateways,
            "ingress": ingress,
            "httpIngress": ingress,
            "config": {"ingress": {"http_port": 8100}},
        }
    )
    for kind, port in (("GRPCRoute", 9000), ("HTTPRoute", 8100)):
        (rule,) = only(objects, kind)["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": "r-kvmesh-serve-svc", "port": port}]
    ports = {
        found["metadata"]["name"]: path["backend"]["service"]["port"]["name"]
        for found in objects
        if found["kind"] == "Ingress"
        for path in found["spec"]["rules"][0]["http"]["paths"]
    }
    assert ports == {"r-kvmesh": "serve-grpc", "r-kvmesh-http": "serve"}


NGINX = "nginx.ingress.kubernetes.io/"


def annotations_of(objects: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Of each Ingress, by its name."""
    found = [x["metadata"] for x in objects if x["kind"] == "Ingress"]
    return {metadata["name"]: metadata["annotations"] for metadata in found}


def test_an_ingress_lets_through_the_longest_prompts_and_replies() -> None:
    http = {"enabled": True, "host": "h.example", "tlsSecret": "t"}
    objects = render({"httpIngress": http}, CHART / "ci/eight-gpus-1m-values.yaml")
    config = build(serve_config_of(objects)["applications"][0]["args"])
    assert config.ingress.max_request_bytes == 32 << 20
    found = annotations_of(objects)
    assert found.keys() == {"r-kvmesh", "r-kvmesh-http"}
    for given in found.values():
        assert int(given[f"{NGINX}proxy-body-size"]) > config.ingress.max_request_bytes
        assert given[f"{NGINX}proxy-read-timeout"] == "3600"


def test_an_ingress_has_the_users_annotations_first() -> None:
    mine = {f"{NGINX}proxy-body-size": "1g", f"{NGINX}proxy-read-timeout": "60", "mine": "x"}
    ingress = {"enabled": True, "host": "a.example", "tlsSecret": "t", "annotations": mine}
    found = annotations_of(render({"ingress": ingress, "httpIngress": ingress}))
    assert len(found) == 2
    for given in found.values():
        assert mine.items() <= given.items()


def test_workers_may_be_scaled_by_ray() -> None:
    sizes = {"replicas": 2, "minReplicas": 0, "maxReplicas": 5}

    def group(scaled: bool) -> dict[str, Any]:
        values = {"autoscaling": {"enabled": scaled}, "workerGroups": {"workers": sizes}}
        cluster = cluster_of(render(values))
        assert cluster.get("enableInTreeAutoscaling", False) is scaled
        pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        restarts = {pod["template"]["spec"].get("restartPolicy") for pod in pods}
        assert restarts == ({"Never"} if scaled else {None})
        found: dict[str, Any] = cluster["workerGroupSpecs"][0]
        return found

    assert sizes.items() <= group(True).items()
    assert {"replicas": 2, "minReplicas": 2, "maxReplicas": 2}.items() <= group(False).items()


def test_a_models_volume_is_shared_and_kept() -> None:
    objects = render({"model": {"volume": {"enabled": True}}})
    claim = only(objects, "PersistentVolumeClaim")["metadata"]
    assert claim["annotations"]["helm.sh/resource-policy"] == "keep"
    variables = {x["name"]: x.get("value") for x in containers(objects)[1]["env"]}
    assert variables["XDG_CACHE_HOME"] == "/models/cache"
    assert variables["HF_HOME"] == "/models/hub"
    read_only = render(
        {"model": {"volume": {"enabled": True, "existingClaim": "c", "readOnly": True}}}
    )
    variables = {x["name"]: x.get("value") for x in containers(read_only)[1]["env"]}
    assert variables["XDG_CACHE_HOME"] == "/tmp/cache"
    assert not [found for found in read_only if found["kind"] == "PersistentVolumeClaim"]


@pytest.mark.parametrize(
    ("hub", "name", "key"),
    [
        ({"token": "hf_secret"}, "r-kvmesh-hub", "token"),
        ({"existingSecret": "mine", "existingSecretKey": "hf"}, "mine", "hf"),
    ],
)
def test_the_hubs_token_is_in_workers_and_if_it_exists_in_the_head(
    hub: dict[str, str], name: str, key: str
) -> None:
    objects = render({"model": {"hub": hub}})
    head, worker = containers(objects)
    secret = {"name": name, "key": key}
    for container, expected in ((worker, secret), (head, {**secret, "optional": True})):
        (token,) = (x for x in container["env"] if x["name"] == "HF_TOKEN")
        assert token["valueFrom"] == {"secretKeyRef": expected}
    rest = [found for found in objects if found["kind"] != "Secret"]
    assert "hf_secret" not in json.dumps(rest)


@pytest.mark.parametrize("offline", [True, False])
def test_no_pod_asks_the_hub_offline(offline: bool) -> None:
    """Serve pins the model on the head: to a commit of today, which the volume may not have."""
    for container in containers(render({"model": {"hub": {"offline": offline}}})):
        variables = {x["name"]: x.get("value") for x in container["env"]}
        assert variables.get("HF_HUB_OFFLINE") == ("1" if offline else None)
        assert "HF_TOKEN" not in variables


def test_alerts_and_dashboards_are_those_in_files(tmp_path: Path) -> None:
    """From a copy of the chart, as it may have none."""
    chart = tmp_path / "kvmesh"
    shutil.copytree(CHART, chart)
    for folder in ("alerts", "dashboards"):
        shutil.rmtree(chart / "files" / folder, ignore_errors=True)
    on = ["--set", "metrics.prometheusRule.enabled=true,metrics.dashboards.enabled=true"]
    without = run("template", "r", chart, *on)
    assert "kind: PrometheusRule" not in without and "kind: ConfigMap" not in without
    rule = {"alert": "A", "expr": "x > 0", "annotations": {"summary": "{{ $labels.group }} is 1"}}
    (chart / "files/alerts").mkdir()
    (chart / "files/alerts/a.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "g", "rules": [rule]}]})
    )
    (chart / "files/dashboards").mkdir()
    (chart / "files/dashboards/the_fleet.json").write_text('{"title": "{{group}}"}\n')
    objects = objects_in(run("template", "r", chart, *on))
    groups = only(objects, "PrometheusRule")["spec"]["groups"]
    assert groups == [{"name": "g", "rules": [rule]}]
    dashboard = only(objects, "ConfigMap")
    assert dashboard["metadata"]["name"] == "r-kvmesh-dashboard-the-fleet"
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["data"] == {"the_fleet.json": '{"title": "{{group}}"}\n'}
    off = [x["kind"] for x in objects_in(run("template", "r", chart))]
    assert "PrometheusRule" not in off and "ConfigMap" not in off


def test_metrics_have_the_labels_that_alerts_and_dashboards_use() -> None:
    """Prometheus' operator adds `namespace` by itself."""
    objects = render(EVERYTHING)
    added = only(objects, "PodMonitor")["spec"]["podTargetLabels"]
    names = {re.sub(r"\W", "_", label) for label in added}
    assert names | {"namespace"} >= {CLUSTER_LABEL, *RELEASE_LABELS}
    cluster = cluster_of(objects)
    for pod in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        labels = pod["template"]["metadata"]["labels"].keys()
        assert {x for x in added if not x.startswith("ray.io/")} <= labels, (
            "KubeRay adds the others"
        )


def test_notes_warn_of_what_is_off() -> None:
    text = run("install", "r", CHART, "--dry-run=client", "--namespace", "ns")
    notes = text[text.index("NOTES:") :]
    assert "gcsFaultTolerance is off" in notes
    assert "port-forward svc/r-kvmesh-serve-svc 9000" in notes
    assert "helm -n ns test r" in notes


# Refusals


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"imgae": {}}, "imgae"),
        ({"image": {"tag": "latest"}}, "/image/tag"),
        ({"config": {"engine": {"kv_fromat": "int8"}}}, "kv_fromat"),
        ({"config": {"engine": {"kv_format": "int9"}}}, "/config/engine/kv_format"),
        ({"config": {"ray": {"address": "auto"}}}, "ray"),
        ({"config": {"layout": {"mode": "auto"}}}, "layout"),
        ({"config": {"ingress": {"host": "::"}}}, "host"),
        ({"config": {"auth": {"key_file": "/k"}}}, "key_file"),
        ({"config": {"timeouts": {"drain_s": "30s"}}}, "/config/timeouts/drain_s"),
        ({"config": {"ingress": {"max_request_bytes": "1MiB"}}}, "max_request_bytes"),
        ({"auth": {"keys": {"a/b": {}}}}, "a/b"),
        ({"auth": {"keys": {"a": {"value": "two words"}}}}, "/auth/keys/a/value"),
        ({"workerGroups": {"Big": {}}}, "Big"),
        ({"workerGroups": {"w": {"gpus": 1}}}, "gpus"),
        ({"workerGroups": {"w": {"cpus": 0.5}}}, "cpus"),
        ({"upgradeStrategy": "Sometimes"}, "/upgradeStrategy"),
        ({"gcsFaultTolerance": {"enabled": True}}, "redisAddress"),
        ({"ingress": {"enabled": True, "host": "h"}}, "tlsSecret"),
        ({"grpcRoute": {"enabled": True}}, "parentRefs"),
        ({"httpRoute": {"enabled": True}}, "parentRefs"),
        ({"httpIngress": {"enabled": True}}, "host"),
        ({"fullnameOverride": "x" * 48}, "/fullnameOverride"),
        ({"workerGroups": {"workers": None}}, "there must be one"),
        ({"config": {"engine": {"tp": 9}}}, "engine-0 is on one worker and needs 9.1 CPUs"),
        (
            {
                "config": {"engine": {"tp": 4}},
                "workerGroups": {"workers": {"cpus": 8, "gpu": {"count": 2}}},
            },
            "and 4 GPUs",
        ),
        ({"config": {"groups": 4}}, "need 4.6"),
        ({"config": {"groups": [{"tp": 3}, {}]}}, "workers have 4"),
        ({"config": {"engine": {"device": "cuda"}}}, "and 1 GPUs"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(HelmError) as caught:
        render(values)
    assert named.strip("/") in str(caught.value).replace("'", "")


# What follows from the code


@pytest.mark.slow
def test_generated_files_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "helm/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_value_is_documented_and_has_a_shape() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    page = (CHART / "README.md").read_text("utf-8")
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(values)
    assert schema["properties"].keys() == values.keys() | {"global"}

    def leaves(value: Any, path: str) -> list[str]:
        if f"| `{path}` |" in page or not isinstance(value, dict) or not value:
            return [path]
        return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{path}.{name}")]

    paths = [leaf for name, value in values.items() for leaf in leaves(value, name)]
    assert not [path for path in paths if f"| `{path}` |" not in page]


def test_versions_are_those_of_the_package_and_of_ray() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert chart["appVersion"] == chart["version"] == project["version"]
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert f"ray=={values['ray']['version']}" in pins


def test_hashes_of_keys_may_be_settings() -> None:
    keys = [{"tenant": "a", "sha256": HASH}]
    objects = render({"config": {"auth": {"keys": keys}}})
    auth = build(serve_config_of(objects)["applications"][0]["args"]).auth
    assert [key.tenant for key in auth.keys] == ["a"]
    assert str(auth.key_directory) == "/etc/kvmesh/keys"


def test_the_charts_own_test_asks_the_model(tmp_path: Path) -> None:
    (pod,) = (x for x in render() if x["kind"] == "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    (script,) = container["args"]
    (tmp_path / "default.admin").write_text("the-key\n")
    (tmp_path / "..data").mkdir()
    choice = pb.Choice(text=" Paris.", finish_reason=pb.FINISH_REASON_LENGTH)
    reply = pb.GenerateResponse(request_id="r", model="m", choices=[choice], usage=pb.Usage())
    servicer = ScriptedServicer(answering(reply))
    with serving(servicer) as target:
        for part, ours in (
            ("r-kvmesh-serve-svc:9000", target),
            ("/etc/kvmesh/keys", str(tmp_path)),
        ):
            assert script.count(part) == 1
            script = script.replace(part, ours)
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == (" Paris.\n", 0), done.stderr
    assert servicer.metadata[0]["authorization"] == "Bearer the-key"
