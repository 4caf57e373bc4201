"""The parts of the control plane's benchmark that need no cluster."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from benchmarks.control_plane.__main__ import HERE, environment_of
from benchmarks.control_plane.costs import medians, ratios, rounded, split_costs
from benchmarks.control_plane.executor import InstantExecutor
from benchmarks.control_plane.load import METHOD, PROMPT_TOKENS, Load, LoadGenerator, make_prompt
from benchmarks.control_plane.processes import KINDS, CpuTimes, kind_of, spent_between
from benchmarks.control_plane.tokens import FIRST_ID, NUM_IDS, Checker, chain, successor
from kvmesh.protos import pb
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.plan import Chunk, RowStart, StepPlan, TableUpdate
from kvmesh.workers.sampling_params import SamplingParams

Damage = Callable[[list[int]], list[int]]

NOTHING = TableUpdate([], [], [])


def test_chain_visits_every_ordinary_token_once() -> None:
    tokens = chain(FIRST_ID, NUM_IDS)
    assert sorted(tokens) == list(range(FIRST_ID, FIRST_ID + NUM_IDS))
    assert successor(tokens[-1]) == tokens[0]


def test_output_that_follows_the_prompt_passes() -> None:
    checker = Checker(FIRST_ID, 5)
    checker.take(chain(FIRST_ID, 5)[:2])
    checker.take(chain(FIRST_ID, 5)[2:])
    checker.end()
    assert checker.seen == 5


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda tokens: tokens[:3] + tokens[4:], id="lost"),
        pytest.param(lambda tokens: [*tokens[:3], tokens[2], *tokens[3:]], id="repeated"),
        pytest.param(lambda tokens: [tokens[1], tokens[0], *tokens[2:]], id="out of order"),
        pytest.param(lambda tokens: chain(FIRST_ID + 1, 8), id="of another stream"),
    ],
)
def test_damaged_output_is_detected(damage: Damage) -> None:
    checker = Checker(FIRST_ID, 8)
    with pytest.raises(ValueError, match="lost, repeated or delivered"):
        checker.take(damage(chain(FIRST_ID, 8)))


@pytest.mark.parametrize("count", [7, 9])
def test_wrong_number_of_tokens_is_detected(count: int) -> None:
    checker = Checker(FIRST_ID, 8)
    checker.take(chain(FIRST_ID, count))
    with pytest.raises(ValueError, match=f"expected 8 output tokens, got {count}"):
        checker.end()


def test_executor_continues_each_prompt_and_reads_the_step_duration() -> None:
    executor = InstantExecutor(EngineConfig(model="any"))
    prompts = [make_prompt(seed, step_ms=3) for seed in (0, 7)]
    result = executor.execute(_plan([_chunk(row, 0, ids) for row, ids in enumerate(prompts)]))
    assert executor.step_s == 3e-3
    first = [token.token_id for token in result.tokens]
    assert first == [successor(prompt[-1]) for prompt in prompts]
    result = executor.execute(_plan([_chunk(1, PROMPT_TOKENS, [first[1]])]))
    assert [token.token_id for token in result.tokens] == chain(prompts[1][-1], 2)[1:]
    assert (executor.num_tokens, executor.steps) == (3, 2)


def test_the_stand_in_for_ranks_finds_their_configuration() -> None:
    from benchmarks.control_plane.engine import InstantRanks
    from kvmesh.cluster.rank_actors import RankActors

    parameters = inspect.signature(RankActors).parameters
    config = EngineConfig(model="any")
    given = [config if x.annotation == "EngineConfig" else None for x in parameters.values()]
    assert InstantRanks(*given).executor.num_ranks == config.tp


async def test_a_turn_of_the_event_loop_is_measured_by_its_cpu_time() -> None:
    from benchmarks.control_plane.turns import Turns

    turns = Turns()
    until_s = time.thread_time() + 0.05
    while time.thread_time() < until_s:
        pass
    await asyncio.sleep(0.01)
    longest = turns.take()
    assert longest["max_s"] >= 0.05 > longest["p99_s"] >= 0.0


def _chunk(row: int, start: int, ids: list[int]) -> Chunk:
    return Chunk(row, start, b"".join(i.to_bytes(4, "little") for i in ids), sample=True)


def _plan(chunks: list[Chunk]) -> StepPlan:
    starts = [RowStart(c.row, SamplingParams(max_tokens=4), c.end, b"") for c in chunks]
    return StepPlan(1, starts, chunks, NOTHING, NOTHING, [], [], [])


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::ServeReplica:kvmesh:ingress", "ingress"),
        ("ray::ServeReplica:kvmesh:ingress.handle_request", "ingress"),
        ("ray::ServeReplica:kvmesh:router", "router"),
        ("ray::ServeReplica:kvmesh:engine-12", "leader"),
        ("/opt/haproxy/bin/haproxy -db -f /run/haproxy.cfg", "haproxy"),
        ("ray::HAProxyManager", "rest"),
        ("ray::ServeController.listen_for_change", "rest"),
        ("/opt/ray/raylet --log /tmp/haproxy", "rest"),
    ],
)
def test_processes_are_recognised_by_their_titles(title: str, kind: str) -> None:
    assert kind_of(title) == kind


def test_spent_time_covers_processes_that_started_in_between() -> None:
    before = CpuTimes({1: ("router", 1.0), 2: ("haproxy", 9.0)}, {5: 2.0}, busy=1.0)
    # The proxy has been replaced, and the leader has a new thread.
    after = CpuTimes({1: ("router", 1.5), 3: ("haproxy", 0.25)}, {5: 2.25, 6: 0.5}, busy=4.0)
    spent = spent_between(before, after)
    assert spent.by_kind == {**dict.fromkeys(KINDS, 0.0), "router": 0.5, "haproxy": 0.25}
    assert (spent.by_thread, spent.busy) == ({5: 0.25, 6: 0.5}, 3.0)


def test_costs_of_tokens_and_requests_are_separated() -> None:
    token, request = 40.0, 5000.0
    found = split_costs(token + request / 256, 256, request + 2 * token, 2)
    assert found == pytest.approx((token, request))
    with pytest.raises(ValueError, match="must be less than tokens_per_request"):
        split_costs(1.0, 2, 1.0, 2)


def test_rounds_are_summarised_by_medians() -> None:
    ours = [{"a": 1.0, "b": {"c": 10.0}}, {"a": 2.0, "b": {"c": 30.0}}, {"a": 9.0, "b": {}}]
    theirs = [{"a": 2.0, "b": {"c": 5.0}}, {"a": 2.0, "b": {"c": 0.0}}, {"a": 3.0, "b": {}}]
    assert medians(ours) == {"a": 2.0, "b": {"c": 20.0}}
    # Round by round, so that a machine that was slow for both has no influence.
    assert ratios(ours, theirs) == {"a": 1.0, "b": {"c": 2.0}}
    assert rounded({"a": 12345.678, "b": {"n": 123456}}) == {"a": 12350.0, "b": {"n": 123456}}


def test_a_baseline_is_measured_by_this_benchmark(tmp_path: Path) -> None:
    """Its own `kvmesh`, but our `benchmarks`."""
    package = tmp_path / "checkout" / "kvmesh"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "checkout" / "benchmarks").mkdir()
    directory = tmp_path / "run"
    directory.mkdir()
    code = "import benchmarks, kvmesh; print(kvmesh.__file__, *benchmarks.__path__, sep=chr(10))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env=environment_of(tmp_path / "checkout", directory, dict(os.environ)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == [
        str(directory / "kvmesh" / "__init__.py"),
        f"{HERE}/benchmarks",
    ]


def answer(damage: Damage) -> grpc.GenericRpcHandler:
    """GenerateStream as the cluster would answer it, but for the damage to each output."""

    async def stream(
        request: pb.GenerateRequest, context: object
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        last = request.prompt.token_ids.ids[-1]
        yield pb.GenerateStreamResponse(started=pb.Started())
        for token in damage(chain(last, request.sampling_params.max_tokens)):
            yield pb.GenerateStreamResponse(delta=pb.Delta(token_ids=[token]))
        yield pb.GenerateStreamResponse(usage=pb.Usage())

    handler = grpc.unary_stream_rpc_method_handler(
        stream,
        request_deserializer=pb.GenerateRequest.FromString,
        response_serializer=pb.GenerateStreamResponse.SerializeToString,
    )
    service, method = METHOD.strip("/").split("/")
    return grpc.method_handlers_generic_handler(service, {method: handler})


@asynccontextmanager
async def load_on_server(damage: Damage) -> AsyncIterator[LoadGenerator]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((answer(damage),))
    health = HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield LoadGenerator(f"127.0.0.1:{port}", api_key=None)
    finally:
        await server.stop(None)


LOAD = Load(streams=2, tokens=8, seconds=0.2, settle_s=0.0, health=True)


async def test_load_counts_what_arrives_within_its_window() -> None:
    said: list[str] = []
    async with load_on_server(list) as generator:
        for seconds in (0.2, 2.0, 20.0):  # the slower the machine, the longer
            load = replace(LOAD, seconds=seconds)
            said.clear()
            outcome = await generator.run(
                load, lambda: said.append("opened"), lambda: said.append("closed")
            )
            assert said == ["opened", "closed"]
            if outcome.requests and outcome.first_token_s is not None:
                break
    # Each token is a message here, and a request has two more.
    assert 0 < outcome.tokens < outcome.messages
    assert outcome.checked_requests >= outcome.requests > 0
    assert outcome.first_token_s is not None
    assert outcome.health_s is not None and outcome.health_max_s is not None
    assert 0 < outcome.health_s <= outcome.health_max_s


async def test_load_fails_when_a_token_is_lost() -> None:
    async with load_on_server(lambda tokens: tokens[:1] + tokens[2:]) as generator:
        with pytest.raises(ExceptionGroup) as raised:
            await generator.run(LOAD, lambda: None, lambda: None)
    assert raised.group_contains(ValueError, match="lost, repeated or delivered")
