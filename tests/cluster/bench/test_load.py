"""Sending requests, and what is noted of their replies."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from kvmesh.cluster.bench.load import LoadRun, ReplyRecord
from kvmesh.cluster.bench.prompts import PromptMaker
from kvmesh.cluster.bench.report import LoadReport, read_objectives, report_of
from kvmesh.cluster.bench.targets import OutputChunk, Prompt, ReplyFailed, TokenCounts
from kvmesh.cluster.bench.workload import BenchRequest
from tests.cluster.bench.scripted_target import ScriptedTarget, TestClock

ONE = BenchRequest(0, prompt_tokens=10, output_tokens=3)
# The first token after 2 s, two more in one chunk 1 s later.
REPLY = (2.0, OutputChunk(1), 1.0, OutputChunk(2), TokenCounts(10, 3, 4))


def requests(count: int, arrival_s: float | None = None) -> list[BenchRequest]:
    return [replace(ONE, number=number, arrival_s=arrival_s) for number in range(count)]


def report(run: LoadRun, **objectives_ms: float) -> LoadReport:
    return report_of(run.records, run.ended_s, objectives_ms)


async def test_the_measures_of_one_reply() -> None:
    clock = TestClock()
    run = LoadRun(ScriptedTarget(clock, REPLY), PromptMaker(0), 1, clock)
    await run.run([ONE])
    found = report(run)
    assert found.timings["ttft"].p50 == 2.0
    assert found.timings["e2e"].p50 == 3.0
    assert found.timings["tpot"].p50 == 0.5, "1 s for the two tokens after the first"
    assert found.timings["itl"].p50 == 1.0, "between two chunks"
    assert found.tokens_per_chunk == 1.5
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (10, 4, 3)
    assert found.duration_s == 3.0
    assert found.output_tokens_per_s == 1.0
    assert found.total_tokens_per_s == pytest.approx(13 / 3)


async def test_requests_are_sent_when_due_though_none_has_ended() -> None:
    """And their latencies count from then: a server that stalls hides nothing."""
    clock = TestClock()
    target = ScriptedTarget(clock, REPLY, (OutputChunk(1),))
    target.gate.clear()
    run = LoadRun(target, PromptMaker(0), None, clock)
    running = asyncio.create_task(run.run(requests(20, arrival_s=0.0)))
    while target.running < 20:
        await asyncio.sleep(0)
    clock.now += 7.0
    target.gate.set()
    await running
    assert report(run).timings["ttft"].p50 >= 7.0
    assert report(run).max_running == 20
    assert report(run).mean_running > 10.0


async def test_a_late_sender_does_not_shorten_latencies() -> None:
    clock = TestClock()
    run = LoadRun(ScriptedTarget(clock, REPLY), PromptMaker(0), None, clock)
    # All are due at the start, but each prompt is made only after the one before has been sent.
    make = PromptMaker.make

    class SlowPrompts(PromptMaker):
        def make(self, request: BenchRequest) -> str | list[int]:
            clock.now += 1.0
            return make(self, request)

    run = LoadRun(ScriptedTarget(clock, (OutputChunk(1),)), SlowPrompts(0), None, clock)
    await run.run(requests(3, arrival_s=0.0))
    assert [record.sent_s for record in run.records] == [1.0, 2.0, 3.0]
    assert [record.due_s for record in run.records] == [0.0, 0.0, 0.0]
    assert report(run).timings["ttft"].mean >= 2.0
    assert report(run).send_lag_p99_s == pytest.approx(3.0, abs=0.05)


async def test_so_many_run_at_a_time_and_no_more() -> None:
    clock = TestClock()
    target = ScriptedTarget(clock, REPLY)
    run = LoadRun(target, PromptMaker(0), 3, clock)
    await run.run(requests(10))
    assert target.max_running == 3
    assert report(run).complete == 10
    assert sorted(record.request.number for record in run.records) == list(range(10))


async def test_failures_are_counted_by_kind_and_are_in_no_latency() -> None:
    clock = TestClock()
    target = ScriptedTarget(
        clock,
        REPLY,
        (ReplyFailed("HTTP 429", "no room for a"),),
        (OutputChunk(1), 50.0, ReplyFailed("broken", "after a token")),
        (ReplyFailed("HTTP 429", "no room for b"),),
        (TokenCounts(10, 0),),
    )
    run = LoadRun(target, PromptMaker(0), 1, clock)
    await run.run(requests(5))
    found = report(run, ttft=2500.0, tpot=400.0)
    assert (found.complete, found.failed, found.unfinished) == (1, 4, 0)
    kinds = {kind: (failure.count, failure.example) for kind, failure in found.failures.items()}
    assert kinds == {
        "HTTP 429": (2, "no room for a"),
        "broken": (1, "after a token"),
        "no output": (1, "the reply has no output"),
    }
    assert next(iter(found.failures)) == "HTTP 429"
    assert found.timings["ttft"].count == found.timings["e2e"].count == 1
    assert found.goodput is not None
    assert found.goodput.requests == 0, "its TPOT is 500 ms"
    assert report(run, tpot=500.0).goodput.share == 0.2  # type: ignore[union-attr]


async def test_a_stopped_run_reports_what_there_is() -> None:
    clock = TestClock()
    stuck = (OutputChunk(1), 1.0, OutputChunk(1))
    target = ScriptedTarget(clock, REPLY, stuck)
    run = LoadRun(target, PromptMaker(0), 1, clock)

    class Stopping(PromptMaker):
        def make(self, request: BenchRequest) -> str | list[int]:
            if request.number == 2:
                run.stop()
            return super().make(request)

    run._prompts = Stopping(0)
    await run.run(requests(50))
    assert run.stopped
    assert len(run.records) < 50
    assert target.running == 0, "what ran has been left"
    found = report(run)
    assert found.complete >= 1
    assert found.complete + found.unfinished == found.requests


async def test_a_bug_of_a_target_is_no_failure_of_a_request() -> None:
    class Broken(ScriptedTarget):
        async def reply(
            self, prompt: Prompt, output_tokens: int
        ) -> AsyncGenerator[OutputChunk | TokenCounts, None]:
            yield OutputChunk()
            raise KeyError("a bug")

    run = LoadRun(Broken(TestClock(), ()), PromptMaker(0), 2)
    with pytest.raises(ExceptionGroup):
        await run.run(requests(3))


async def test_without_the_servers_counts_chunks_count() -> None:
    clock = TestClock()
    run = LoadRun(ScriptedTarget(clock, (OutputChunk(), OutputChunk())), PromptMaker(0), 1, clock)
    await run.run([ONE])
    assert (run.records[0].prompt_tokens, run.records[0].output_tokens) == (10, 2)
    assert report(run).short_outputs == 1


def test_a_report_of_nothing() -> None:
    found = report_of([], 0.0, {"ttft": 1.0})
    assert found.requests == found.max_running == 0
    assert math.isnan(found.timings["ttft"].p99)


def test_percentiles_are_of_all_requests() -> None:
    records = []
    for number in range(101):
        record = ReplyRecord(ONE, 0.0, 0.0, ended_s=1.0, output_tokens=1)
        record.chunk_s.append(float(number))
        records.append(record)
    times = report_of(records, 100.0, {}).timings["ttft"]
    assert (times.count, times.mean, times.p50, times.p90, times.p99) == (101, 50, 50, 90, 99)
    assert report_of(records, 100.0, {}).timings["tpot"].count == 0, "of one token there is none"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["ttft:500", "tpot:50"], {"ttft": 500.0, "tpot": 50.0}),
        (["ttft:500,tpot:50"], {"ttft": 500.0, "tpot": 50.0}),
        (["E2EL:1e3"], {"e2e": 1000.0}),
        ([], {}),
    ],
)
def test_objectives(texts: list[str], expected: dict[str, float]) -> None:
    assert read_objectives(texts) == expected


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "ttft:0", "ttft:-1", "p99:5", ""])
def test_wrong_objectives_name_the_right_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"ttft:MS, tpot:MS or e2e:MS"):
        read_objectives([text])
