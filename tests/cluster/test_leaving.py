"""Groups whose node or engine leaves: they take nothing new, and what they have is not lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvmesh.cluster import router_service
from kvmesh.cluster.group_scaler import GroupScaler, ScalingError
from kvmesh.cluster.leaving import name_while_leaving, to_close
from kvmesh.cluster.messages import Place, Report
from kvmesh.cluster.reports import EngineReport
from kvmesh.cluster.routing.autoscaling import AutoscalingPolicy
from kvmesh.cluster.routing.errors import NoRoomError
from kvmesh.cluster.telemetry import table
from kvmesh.workers.loads import EngineLoads
from tests.cluster.machine import Machine, WatchedEngine, answer, machine
from tests.cluster.test_generation import PROMPT, make_request, read, read_until, rest_of
from tests.cluster.test_leases import Zombie
from tests.cluster.test_router_service import FarEnd, Routed, placed, report
from tests.routing.groups import ask
from tests.workers.test_leader import MANY, GatedExecutor


def test_groups_of_a_node_that_leaves_close_unless_they_are_the_last() -> None:
    takes = {"g0": "a", "g1": "b", "g2": "a"}
    assert to_close(takes, {"a"}) == ["g0", "g2"]
    assert to_close(takes, {"c"}) == []
    assert to_close(takes, {"a", "b"}) == []
    assert to_close({}, {"a"}) == []


def test_a_group_that_leaves_gets_a_name_that_none_has() -> None:
    assert name_while_leaving("g0", {"g1"}) == "g0.leaving"
    assert name_while_leaving("g0", {"g0.leaving", "g0.leaving1"}) == "g0.leaving2"


async def successor(one: Machine, name: str, node: str = "") -> WatchedEngine:
    """A later engine of a group, which starts while the other one is still there."""
    executor = GatedExecutor()
    executor.allow(MANY)
    former, one.executors[name] = one.executors[name], executor
    one.replaced.append(one.engines[name])
    one.executors[f"{name}, the former"] = former
    engine = WatchedEngine(name, executor, one.find_router)
    engine._account._node = node
    one.engines[name] = engine
    await engine.start()
    epoch = engine.leader.account.info.epoch
    await one.until(lambda: one.router.router.fleet.groups[name].info.epoch == epoch)
    return engine


async def test_what_cannot_end_in_time_continues_on_another_group() -> None:
    """With the same tokens, none of them twice, and no suspicion."""
    async with machine(groups=2) as two:
        two.allow(6)
        stream = two.stream(make_request(40))
        received = await read_until(stream, 5)
        (name,) = (name for name, engine in two.engines.items() if engine.submitted)
        (other,) = two.engines.keys() - {name}
        draining = asyncio.create_task(two.engines[name].drain(0.0))
        # A step is in flight; after it, the sequence is handed over.
        await two.until(lambda: not two.leaders[name]._thread._commands.empty())
        two.allow(MANY)
        received = await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 40)
        assert received.usage is not None
        assert received.usage.failovers == 1
        await draining
        assert two.engines[other].submitted[-1].suspicion == 0
        assert two.meters.of(table.FAILOVERS, name, "cleared") == 1
        await two.at_rest()


async def test_a_group_on_a_node_that_drains_takes_nothing_new() -> None:
    async with machine(groups=2) as two:
        two.allow(MANY)
        for index, group in enumerate(two.router.groups.all):
            group.node = f"node-{index}"
        two.router.groups.nodes_leave(frozenset({"node-0"}))
        assert [g.closed for g in two.router.groups.all] == [True, False]
        for number in range(3):
            await read(two.stream(make_request(5, request_id=f"r{number}")))
        assert not two.engines["g0"].submitted
        status = two.router.status()
        two.engines["g0"]._account.report_now()
        await two.until(lambda: two.router.status().reports["g0"].draining)
        assert not status.reports["g1"].draining
        # The last one stays open until there is another.
        two.router.groups.nodes_leave(frozenset({"node-0", "node-1"}))
        await read(two.stream(make_request(5, request_id="last")))
        await successor(two, "g0", "node-2")
        assert two.router.groups["g1"].closed
        await read(two.stream(make_request(5, request_id="next")))
        assert two.engines["g0"].submitted


@pytest.mark.parametrize("known_by", ["node", "report"])
async def test_an_engine_that_leaves_ends_its_sequences_next_to_its_successor(
    known_by: str,
) -> None:
    async with machine() as one:
        one.allow(6)
        stream = one.stream(make_request(40))
        received = await read_until(stream, 5)
        former = one.engines["g0"]
        if known_by == "node":
            one.router.groups["g0"].node = "old"
            one.router.groups.nodes_leave(frozenset({"old"}))
            assert not one.router.groups["g0"].closed, "it is the only one"
        draining = asyncio.create_task(former.drain(1000.0))
        if known_by == "report":
            await one.until(lambda: one.router.groups["g0"].closed)
        await successor(one, "g0", "new")
        assert one.router.groups.names == {*one.router.status().reports} == {"g0", "g0.leaving"}
        assert one.leases() == 1
        # New requests go to the later engine, while the former one computes nothing.
        await read(one.stream(make_request(5, request_id="new")))
        assert former.sequences == [former.submitted[0].sequences[0].request_id]
        one.allow(MANY)
        received = await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 40)
        assert received.usage is not None
        assert received.usage.failovers == 0
        await draining
        await former.stop()
        await one.until(lambda: one.router.groups.names == {"g0"})
        status = one.router.status()
        assert [group.group for group in status.router.groups] == ["g0"]
        assert {*status.reports} == {"g0"}
        assert status.audit_faults_total == 0
        await one.at_rest()
        one.router.router.leases.check_integrity()


async def test_a_draining_engine_that_connects_again_stays_next_to_its_successor() -> None:
    """As to a new router, which may hear the successor first."""
    async with machine() as one:
        old = Zombie(one, "g0")
        await old.greet(draining=True)
        await one.until(lambda: "g0.leaving" in one.router.groups.names)
        groups = {group.group: group.sequences for group in one.router.status().router.groups}
        assert groups == {"g0": 0, "g0.leaving": 1}
        assert one.router.groups["g0.leaving"].closed and not one.router.groups["g0"].closed
        assert old.heard == []
        one.router.groups["g0.leaving"].connection.abort()
        await one.until(lambda: one.router.groups.names == {"g0"})
        assert one.leases() == 0


async def test_a_group_that_is_not_wanted_any_more_takes_nothing_when_it_comes() -> None:
    async with machine(groups=2) as two:
        two.router.groups.expect(frozenset({"g0"}))
        two.engines["g1"]._account._connection.close()  # type: ignore[union-attr]
        await two.until(lambda: "g1" not in two.router.groups.names)
        await two.until(lambda: "g1" in two.router.groups.names)
        assert two.router.groups["g1"].closed and not two.router.groups["g0"].closed


async def test_groups_are_started_and_stopped_as_the_load_asks_for_them() -> None:
    """Serve's part is played by the machine; a group that is removed ends what it has."""
    async with machine(groups=2) as two:
        calls: list[tuple[str, int]] = []
        fails = [ScalingError("not now")]

        async def set_replicas(group: str, count: int) -> None:
            if fails:
                raise fails.pop()
            calls.append((group, count))

        policy = AutoscalingPolicy(1, wait_s=1e-3, up_after_s=0.0, down_after_s=0.0)
        scaler = GroupScaler(two.router, policy, ["g0", "g1"], ["g0", "g1"], set_replicas)
        two.allow(6)
        streams = [two.stream(make_request(40, request_id=name)) for name in "ab"]
        received = [await read_until(stream, 2) for stream in streams]
        assert all(engine.submitted for engine in two.engines.values())
        await scaler.step()
        assert two.router.groups["g1"].closed and calls == [], "Serve has refused"
        await scaler.step()
        await scaler.step()
        assert calls == [("g1", 0)]
        draining = asyncio.create_task(two.engines["g1"].drain(1000.0))
        two.allow(MANY)
        for stream, so_far in zip(streams, received, strict=True):
            got = await rest_of(stream, so_far)
            assert got.tokens[0] == answer(PROMPT, 40)
            assert got.usage is not None and got.usage.failovers == 0
        await draining
        await two.engines["g1"].stop()
        await two.until(lambda: two.router.groups.names == {"g0"})
        assert {*two.router.status().reports} == {"g0"}
        assert {group.group for group in two.router.status().router.groups} == {"g0"}
        # A request that does not fit now asks for it again.
        two.router.on_refused(NoRoomError("full", 1.0, 2, 1))
        await scaler.step()
        assert calls[1:] == [("g1", 1)]
        two.router._measured_s -= router_service.MEASURE_PERIOD_S
        two.router.tick()
        assert [two.router.meters.of(table.GROUP_WANTED, name) for name in ("g0", "g1")] == [1, 1]
        assert [two.router.meters.of(table.GROUP_UP, name) for name in ("g0", "g1")] == [1, 0]


@pytest.mark.parametrize("took_it", [False, True])
async def test_a_group_that_is_wanted_again_runs_whether_or_not_serve_took_its_end(
    took_it: bool,
) -> None:
    routed = Routed("g0", "g1")
    asked: list[tuple[str, int]] = []
    fails = [ScalingError("no answer")]

    async def set_replicas(group: str, count: int) -> None:
        asked.append((group, count))
        if fails:
            raise fails.pop()

    policy = AutoscalingPolicy(1, down_after_s=0.0)
    scaler = GroupScaler(routed.service, policy, ["g0", "g1"], ["g0", "g1"], set_replicas)
    await scaler.step()
    assert routed.service.groups["g1"].closed
    if took_it:
        routed.engines["g1"].says(report(draining=True))
    routed.service.on_refused(NoRoomError("full", 1.0, 2, 1))
    await scaler.step()
    assert asked == [("g1", 0), ("g1", 1)]
    ingress = FarEnd(routed)
    placed(ingress, "a", 1)
    ingress.says(Place(2, ask("b")))
    assert routed.waiting == took_it, "its engine ends, and Serve starts another"
    assert routed.service.groups["g1"].closed == took_it


async def test_serve_hears_of_groups_that_it_could_not_be_asked_about() -> None:
    routed = Routed("g0")
    asked: list[tuple[str, int]] = []

    async def set_replicas(group: str, count: int) -> None:
        asked.append((group, count))

    scaler = GroupScaler(routed.service, AutoscalingPolicy(1), ["g0", "g1"], ["g0"], set_replicas)
    await scaler.step()
    await scaler.step()
    assert asked == [("g1", 0)]


def test_a_group_that_is_wanted_again_stays_closed_while_its_node_leaves() -> None:
    routed = Routed("g0", "g1")
    groups = routed.service.groups
    groups["g1"].node = "old"
    groups.nodes_leave(frozenset({"old"}))
    groups.expect(frozenset({"g0"}))
    groups.expect(frozenset({"g0", "g1"}))
    assert groups["g1"].closed and not groups["g0"].closed


async def test_a_request_that_waits_goes_to_the_group_that_comes() -> None:
    async with machine() as one:
        one.allow(MANY)
        one.router.groups.close("g0")
        waits = asyncio.create_task(read(one.stream(make_request(5))))
        await one.until(lambda: one.router.status().router.queue_depth == 1)
        engine = await successor(one, "g0")
        assert (await waits).tokens[0] == answer(PROMPT, 5)
        assert engine.submitted
        await one.at_rest()


async def test_a_request_that_waits_is_not_given_to_a_group_of_another_format() -> None:
    async with machine() as one:
        one.allow(MANY)
        one.router.groups.close("g0")
        kv_format = one.leaders["g0"].account.info.kv_format
        request = make_request(5)
        request.allowed_kv_formats.append(kv_format)
        waits = asyncio.create_task(read(one.stream(request)))
        await one.until(lambda: one.router.status().router.queue_depth == 1)
        other = "int8" if kv_format == "exact" else "exact"
        await Zombie(one, "g0").greet(time.time_ns(), kv_format=other)
        await one.until(lambda: one.router.groups["g0"].info.epoch == "zombie")
        assert one.router.status().router.queue_depth == 1
        await successor(one, "g0")
        assert (await waits).tokens[0] == answer(PROMPT, 5)
        await one.at_rest()


async def test_what_a_lost_group_had_is_no_longer_reported() -> None:
    async with machine() as one:
        connection = one.router.groups["g0"].connection
        info = one.leaders["g0"].account.info
        one.router.groups.report(
            "g0", Report(EngineReport(info, EngineLoads(running=3)), audited=False)
        )
        assert one.router.status().reports["g0"].loads.running == 3
        one.router.groups.down(connection)
        assert one.router.status().reports["g0"] == EngineReport(info, EngineLoads())
