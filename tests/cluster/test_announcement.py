"""What `serve`, `demo` and `status` say of a cluster that is ready."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvmesh.client import GroupFacts, Loads
from kvmesh.client.responses import mirror
from kvmesh.cluster.cli import demo
from kvmesh.cluster.cli.server_commands import _announce
from kvmesh.cluster.cli.status_view import show_cluster
from kvmesh.cluster.config import ClusterConfig, build
from kvmesh.cluster.lifecycle import Endpoint
from kvmesh.v1alpha import admin_pb2 as admin

GROUP = GroupFacts(
    group="engine-0", kv_format="k4v4", dtype="bfloat16", tp=8, kvp=1, page_size=64,
    sink_pages=1, recent_pages=2, max_num_seqs=256, hot_pages=9, sealed_pages=9,
    hot_page_bytes=1, sealed_page_bytes=1, capacity_bytes=3 << 30, max_num_batched_tokens=8192,
    device="cuda",
)  # fmt: skip
ENDPOINT = Endpoint(
    "127.0.0.1:9100", "http://127.0.0.1:8000", "secret", "http://127.0.0.1:1/metrics", None
)


def announced(
    endpoint: Endpoint, config: ClusterConfig, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    _announce(endpoint, config, [GROUP])
    written = capsys.readouterr()
    return written.out, written.err


def test_everything_is_where_people_look_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    config = build({"auth": {"key_file": "/etc/the_key"}})
    out, err = announced(ENDPOINT, config, capsys)
    assert out == "ready at 127.0.0.1:9100\n", "programs read this line"
    for words in (
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:1/metrics",
        "/etc/the_key",
        "engine-0",
        "8 × cuda bfloat16, 3.0 GiB of KV in k4v4, 256 sequences at a time, 8,192 tokens a step",
        'kvmesh generate --target 127.0.0.1:9100 "Once upon a time"',
        "kvmesh chat --target 127.0.0.1:9100",
        "Ctrl-C",
    ):
        assert words in err
    assert "secret" not in out + err
    assert "anyone" not in err


def test_what_does_not_apply_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = Endpoint("127.0.0.1:9000", "http://127.0.0.1:8000", None, None, None)
    _, err = announced(endpoint, build({"auth": {"mode": "none"}}), capsys)
    for words in ("metrics", "dashboard", "key ", "--target"):
        assert words not in err
    assert "anyone who can reach this port" in err


@pytest.mark.parametrize(
    ("target", "variable", "is_default"),
    [
        ("127.0.0.1:9000", "", True),
        ("localhost:9000", "", True),
        ("10.0.0.5:9000", "", False),
        ("10.0.0.5:9000", "10.0.0.5:9000", True),
        ("127.0.0.1:9000", "10.0.0.5:9000", False),
    ],
)
def test_the_commands_to_try_reach_this_server(
    target: str,
    variable: str,
    is_default: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVMESH_TARGET", variable)
    _, err = announced(replace(ENDPOINT, target=target), build({}), capsys)
    assert (f"kvmesh chat --target {target}\n" not in err) == is_default


def test_the_demo_describes_the_groups_that_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With autoscaling, not all that are configured do."""
    client = SimpleNamespace(groups=lambda: (replace(GROUP, kvp=2),))
    monkeypatch.setattr(demo, "Client", lambda *_, **__: nullcontext(client))
    config = build({"groups": 2, "autoscaling": {"min_groups": 1}})
    demo._describe(config, ENDPOINT)
    shown = capsys.readouterr().out
    assert "engine-0: 16 ranks, KV format k4v4" in shown
    assert "engine-1" not in shown


def test_status_shows_what_auto_became(capsys: pytest.CaptureFixture[str]) -> None:
    reply = admin.GetLoadsResponse(groups=[admin.GroupLoads(group="engine-0", kv_format="k4v4")])
    show_cluster([GROUP], mirror(Loads, reply))
    shown = " ".join(capsys.readouterr().out.split())
    assert "at most on cuda in bfloat16: 256 sequences, 8,192 tokens a step" in shown


def test_a_format_that_hurts_the_model_is_shown_at_the_start_and_by_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    warning = "int4 hurts this model: 1.341 nats from exact KV [mean KL]; use k3v2"
    group = replace(GROUP, kv_format="int4", kv_format_warning=warning)
    _announce(ENDPOINT, build({}), [group])
    assert warning in " ".join(capsys.readouterr().err.split())
    reply = admin.GetLoadsResponse(groups=[admin.GroupLoads(group="engine-0", kv_format="int4")])
    show_cluster([group], mirror(Loads, reply))
    assert warning in " ".join(capsys.readouterr().out.split())
