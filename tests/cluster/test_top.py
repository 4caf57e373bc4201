"""What `kvmesh top` shows of loads, at the width of a terminal."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from datetime import datetime
from typing import Any

import pytest
from rich.console import Console

from kvmesh.client.errors import UnavailableError
from kvmesh.client.types import (
    GroupLoads,
    LatencySummary,
    Loads,
    PagesLoad,
    RouterLoads,
    SequenceLoads,
)
from kvmesh.cluster.cli import top_command
from kvmesh.cluster.cli.top_view import Picture, fleet, longest_running
from kvmesh.cluster.ingress import admin_wire
from kvmesh.workers import engine_thread
from tests.cluster.machine import TENANT, machine
from tests.cluster.test_metrics import generate
from tests.workers.test_leader import MANY

GIB = 1 << 30
NO_LATENCY = LatencySummary(0, 0.0, 0.0, 0.0, 0.0)
PAGES = PagesLoad(10, 5, 2, 3, 100)
GROUP = GroupLoads(
    group="engine-0",
    kv_format="int4",
    healthy=True,
    draining=False,
    running=3,
    waiting=1,
    hot=PAGES,
    sealed=PAGES,
    used_bytes=100 * GIB,
    cached_bytes=50 * GIB,
    free_bytes=50 * GIB,
    total_bytes=200 * GIB,
    prompt_tokens_total=1000,
    completion_tokens_total=500,
    cached_tokens_total=100,
    preemptions_total=0,
    steps_total=50,
    outcomes_total={},
    time_to_first_token=LatencySummary(9, 1.0, 1.25, 2.0, 3.0),
    time_per_output_token=LatencySummary(9, 0.02, 0.021, 0.03, 0.04),
    queue_time=NO_LATENCY,
    oldest=(),
)
LONG = SequenceLoads("acme", "a-request-with-a-rather-long-name", 754.2, 1_000_000, 0, 620_000, 400)
OLD = SequenceLoads("", "", 900.0, 100, 2048, 2148, 0)
ROUTER = RouterLoads(1, 12, 256, 4, (), 9, 5, 0, {"ERROR_REASON_QUOTA": 2}, 100, 0, 33.0)


def picture(at_s: float, *groups: GroupLoads, router: RouterLoads = ROUTER) -> Picture:
    return Picture(Loads(groups, router), "some-model", at_s, datetime(2026, 1, 2, 3, 4, 5))


def shown(now: Picture, before: Picture | None = None, requests: int = 9, note: str = "") -> str:
    file = io.StringIO()
    console = Console(file=file, width=80, color_system=None, highlight=False)
    console.print(fleet(now, before, requests, note))
    lines = file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    return "\n".join(line.rstrip() for line in lines)


def changed(**changes: Any) -> GroupLoads:
    return dataclasses.replace(GROUP, **changes)


def test_everything_is_shown_in_80_columns() -> None:
    later = changed(
        prompt_tokens_total=4000, completion_tokens_total=1500, oldest=(OLD, LONG), group="a" * 40
    )
    before = picture(10.0, changed(group="a" * 40))
    text = shown(picture(12.0, later), before)
    assert "some-model  1 of 1 groups up  03:04:05" in text
    assert "12 of 256 waiting for room, the oldest for 33 s; 4 leases, 2 refused" in text
    assert "███████▒▒▒░░░░  50% 200.0 GiB" in text
    for figure in ("1,500", "500", "1.25 s", "21 ms"):
        assert figure in text, "rates, latencies"
    assert "acme/a-request" in text and "12 min 34 s" in text
    assert "62% of 1,000,000" in text
    assert "unknown" in text and "100% of 100" in text and "2,048" in text
    assert text.index("unknown") < text.index("acme"), "the oldest first"


def test_there_are_no_rates_without_an_earlier_picture_or_across_a_new_engine() -> None:
    now = picture(12.0, GROUP)
    restarted = picture(10.0, changed(prompt_tokens_total=2000, completion_tokens_total=900))
    for before in (None, restarted, now):
        assert shown(now, before).count("–") == 2


def test_what_is_wrong_is_said() -> None:
    faulty = dataclasses.replace(ROUTER, audit_faults_total=1)
    text = shown(
        picture(1.0, changed(healthy=False), changed(draining=True), router=faulty), note="gone"
    )
    for words in ("down", "draining", "1 audits with errors", "gone", "1 of 2 groups up"):
        assert words in text


@pytest.mark.parametrize("requests", [0, 1])
def test_as_many_requests_as_there_is_room_for(requests: int) -> None:
    text = shown(picture(1.0, changed(oldest=(OLD, LONG))), requests=requests)
    assert ("longest running" in text, "unknown" in text) == (bool(requests),) * 2
    assert "acme" not in text


async def test_the_oldest_sequences_are_named_as_their_clients_named_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_thread, "LOADS_PERIOD_S", 0.0)  # a report with every step
    async with machine() as built:
        account = built.engines["g0"].leader.account
        running = asyncio.ensure_future(generate(built, 8, "my-request"))
        built.allow(3)
        await built.until(lambda: account.loads.steps_total == 3)
        built.engines["g0"]._account.report_now()
        await built.until(lambda: bool(built.router.status().requests))
        (group,) = admin_wire.loads(built.router.status()).groups
        built.allow(MANY)
        await running
    (one,) = group.oldest
    assert (one.tenant, one.request_id) == (TENANT, "my-request")
    assert (one.prompt_tokens, one.computed_tokens, one.completion_tokens) == (5, 7, 3)


def test_of_all_groups_the_oldest_come_first() -> None:
    groups = (changed(oldest=(LONG,)), changed(group="b", oldest=(OLD,)))
    assert [group for group, _ in longest_running(groups)] == ["b", "engine-0"]


def test_watching_outlasts_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24, color_system=None)
    monkeypatch.setattr(top_command, "out", console)
    answers: list[Loads | BaseException] = [
        Loads((GROUP,), ROUTER),
        UnavailableError("it is gone"),
        Loads((changed(group="back"),), ROUTER),
        KeyboardInterrupt(),
    ]

    class Answering:
        def loads(self) -> Loads:
            answer = answers.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer

    before = picture(0.0, GROUP)
    with pytest.raises(KeyboardInterrupt):
        top_command._watch(Answering(), before, 0.0)  # type: ignore[arg-type]
    frames = file.getvalue().split("some-model")[1:]
    assert ["it is gone" in frame for frame in frames] == [False, True, False]
    assert "engine-0" in frames[1] and "back" in frames[2]
    assert file.getvalue().rstrip().endswith("\x1b[?25h\x1b[?1049l"), "the screen is as before"
