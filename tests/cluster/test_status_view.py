"""`kvmesh status`: each figure is where its name is."""

from __future__ import annotations

from dataclasses import replace

from kvmesh.client import GroupLedger, GroupLoads, LatencySummary, PagesLoad
from kvmesh.cluster.cli.status_view import _group

GROUP = GroupLoads(
    group="engine-0",
    kv_format="k8v4",
    healthy=True,
    draining=False,
    running=1,
    waiting=2,
    hot=PagesLoad(used=3, cached=4, free=5, total=12, page_bytes=1),
    sealed=PagesLoad(used=6, cached=7, free=8, total=21, page_bytes=1),
    used_bytes=9 << 10,
    cached_bytes=10 << 10,
    free_bytes=11 << 10,
    total_bytes=30 << 10,
    prompt_tokens_total=12,
    completion_tokens_total=13,
    cached_tokens_total=14,
    preemptions_total=15,
    steps_total=16,
    outcomes_total={"stop": 17, "length": 18},
    time_to_first_token=LatencySummary(1, 1.0, 2.0, 3.0, 4.0),
    time_per_output_token=LatencySummary(1, 0.001, 0.002, 0.003, 0.004),
    queue_time=LatencySummary(0, 0.0, 0.0, 0.0, 0.0),
    oldest=(),
    pinned_pages=19,
    pinned_evictions_total=20,
)


def rows(group: GroupLoads, ledger: GroupLedger | None = None) -> dict[str, str]:
    names, texts = (list(column.cells) for column in _group(group, None, ledger).columns)
    return dict(zip(map(str, names), map(str, texts), strict=True))


def test_every_figure_of_a_group() -> None:
    ledger = GroupLedger("engine-0", 1, 2, 3, 4, 5, leased_bytes=21 << 10, total_bytes=30 << 10)
    assert rows(GROUP, ledger) == {
        "KV in use": "9.0 KiB of 30.0 KiB, 21.0 KiB leased",
        "hot pages per rank": "3 used, 4 cached, 5 free",
        "sealed pages per rank": "6 used, 7 cached, 8 free",
        "pinned": "19 pages, 20 were needed",
        "sequences": "1 running, 2 waiting, 15 preempted",
        "tokens": "12 prompt (14 cached), 13 output",
        "ended": "18 length, 17 stop",
        "first token, p50 / p99": "2.00 s / 4.00 s",
        "per token, p50 / p99": "2 ms / 4 ms",
        "queue, p50 / p99": "–",
    }


def test_what_has_not_happened_is_not_mentioned() -> None:
    quiet = replace(GROUP, pinned_pages=0, pinned_evictions_total=0, outcomes_total={})
    found = rows(quiet)
    assert "pinned" not in found
    assert (found["ended"], found["KV in use"]) == ("none", "9.0 KiB of 30.0 KiB")
    assert rows(replace(quiet, pinned_pages=1))["pinned"] == "1 pages"


def test_the_state_of_a_group() -> None:
    for group, state in (
        (GROUP, "up"),
        (replace(GROUP, healthy=False), "down"),
        (replace(GROUP, healthy=False, draining=True), "draining"),
    ):
        assert f"]{state}[/" in str(_group(group, None, None).title)
