"""Leases of live requests: told of the first token, grown ahead of the output, learned from;
and what engines tell of the pages they hold."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from kvmesh.cluster.engine_service import ABORTED_LIMIT
from kvmesh.cluster.ingress.attempt import sequence_id
from kvmesh.cluster.ingress.errors import NotReadyError, RequestAbortedError
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageNeed
from tests.cluster.machine import METADATA, CountingRouter, Machine, answer, machine
from tests.cluster.test_generation import PROMPT, Received, asked, read, read_until, rest_of
from tests.workers.test_engine import PAGE
from tests.workers.test_leader import MANY

# One answer is enough to believe in: leases are small from the second request on.
EAGER = RouterConfig(least_samples=1)


async def answered(built: Machine, max_tokens: int, request_id: str) -> None:
    """A request that the router learns from."""
    await read(built.stream(asked(max_tokens, request_id=request_id)))


async def accounted(built: Machine, sequences: int) -> None:
    """Until the first engine's account, which may be some steps old, has so many sequences."""
    async with asyncio.timeout(20):
        while sum(x.sequences for x in built.leaders["g0"].loads().leases) < sequences:
            built.allow(1)
            await asyncio.sleep(0.01)


async def agree(built: Machine) -> None:
    """No engine holds more than the ledger has leased there."""
    await built.router.refresh()
    ledger = {group.group: group for group in (await built.router.status()).router.groups}
    for name, leader in built.leaders.items():
        pool = leader.loads().pool
        assert pool.sealed_used <= ledger[name].sealed_pages_used
        assert pool.hot_used <= ledger[name].hot_pages_used


async def test_a_lease_covers_what_was_learned_and_grows_with_the_output() -> None:
    async with machine(config=EAGER) as one:
        one.allow(MANY)
        await answered(one, 20, "teacher")
        received = await read(one.stream(asked(300)))
        assert received.tokens[0] == answer(PROMPT, 300)
        first, second = one.router.granted
        assert first.lease.sealed_pages == first.lease.most_sealed_pages
        assert second.leased_output_tokens == 20
        assert second.lease.sealed_pages == (len(PROMPT) + 20) // PAGE
        # Half as much again each time, not page by page.
        assert 2 <= one.router.grown[second.lease.lease_id] <= 8
        assert one.lines["g0"].extended[-1].sealed_pages <= second.lease.most_sealed_pages
        assert received.usage is not None
        assert received.usage.kv_sealed_pages == (len(PROMPT) + 299) // PAGE
        assert received.started is not None
        assert received.started.kv_reserved_bytes < received.usage.kv_reserved_bytes
        await one.settled()
        assert one.router.told_begun[second.lease.lease_id] == 1
        assert one.router.learned == [20, 300]


async def test_an_engine_pauses_what_has_used_up_its_lease() -> None:
    async with machine(config=EAGER) as one:
        one.allow(MANY)
        await answered(one, 20, "teacher")
        one.router.hold_grow.clear()
        stream = one.stream(asked(200))
        # The lease is for one sealed page: two pages, less the token that would fill the second.
        received = await read_until(stream, 2 * PAGE - len(PROMPT))
        await accounted(one, 1)
        await agree(one)
        assert one.leaders["g0"].loads().running == 1
        # Another goes on meanwhile.
        await answered(one, 10, "other")
        one.router.hold_grow.set()
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 200)
        assert received.usage is not None
        assert received.usage.preemptions == 0


async def test_a_growth_waits_until_pages_are_free() -> None:
    async with machine(config=EAGER) as one:
        one.allow(MANY)
        await answered(one, 20, "teacher")
        # An older lease that may still grow leaves so little that nobody else may.
        ledger = one.router._ledger
        total = ledger.accounts["g0"].spec.capacity.sealed
        need, most = PageNeed(1, total - 13), PageNeed(1, total - 1)
        oldest = ledger.grant("g0", need, 0.0, request_id="oldest", most=most)
        stream = one.stream(asked(200))
        received = await read_until(stream, 2 * PAGE - len(PROMPT))
        lease_id = one.router.granted[-1].lease.lease_id
        await asyncio.wait_for(one.router.growing.wait(), 20)
        await accounted(one, 1)
        assert one.router.grown[lease_id] == 0
        assert one.leaders["g0"].loads().running == 1
        ledger.release(oldest.lease_id, 0.0)
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 200)
        assert one.router.grown[lease_id] >= 1


async def test_a_client_that_does_not_read_does_not_hold_up_its_lease() -> None:
    async with machine(config=EAGER) as one:
        one.allow(MANY)
        await answered(one, 20, "teacher")
        stream = one.stream(asked(200))
        assert (await anext(stream)).HasField("started")
        received = Received()
        received.started = pb.Started()
        received.take(await anext(stream))
        await asyncio.wait_for(one.leaders["g0"]._idle.wait(), 20)
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 200)
        assert received.deltas < 10


async def test_all_choices_of_a_lease_grow_together() -> None:
    async with machine(config=EAGER) as one:
        one.allow(MANY)
        await answered(one, 20, "teacher")
        received = await read(one.stream(asked(120, n=3)))
        assert received.tokens == {i: answer(PROMPT, 120) for i in range(3)}
        lease = one.router.granted[-1].lease
        assert one.router.grown[lease.lease_id] >= 1
        assert one.router.learned[-1] == 120


async def test_a_lease_does_not_grow_while_one_of_its_sequences_is_on_its_way() -> None:
    """The one on its way carries the share of before, and would pause there for ever."""
    async with machine(config=EAGER) as one:
        one.allow(MANY)
        await answered(one, 20, "teacher")
        line, leader = one.lines["g0"], one.leaders["g0"]
        line.ahead = 1
        line.let_through.clear()
        line.arrived.clear()
        before = leader.loads().completion_tokens_total
        reading = asyncio.ensure_future(read(one.stream(asked(120, n=2))))
        await asyncio.wait_for(line.arrived.wait(), 20)
        # The first uses up its share of the lease meanwhile.
        async with asyncio.timeout(20):
            while leader.loads().completion_tokens_total - before < 2 * PAGE - len(PROMPT):
                await asyncio.sleep(0)
        for _ in range(20):  # what the last token leads to
            await asyncio.sleep(0)
        assert not one.router.growing.is_set()
        line.let_through.set()
        received = await asyncio.wait_for(reading, 20)
        assert received.tokens == {i: answer(PROMPT, 120) for i in range(2)}


async def test_only_natural_ends_are_learned_from() -> None:
    async with machine() as one:
        stream = one.stream(asked(60))
        one.allow(6)
        received = await read_until(stream, 4)
        reply = await one.ingress.abort(pb.AbortRequest(request_id="r"), METADATA)
        assert reply.aborted
        one.allow(3)
        await rest_of(stream, received)
        await one.settled()
        assert one.router.learned == [None]


# Two of one id, and what ends between placing and submitting


async def test_an_abort_between_placing_and_submitting_holds() -> None:
    async with machine() as one:
        one.allow(MANY)
        line = one.lines["g0"]
        line.let_through.clear()
        reading = asyncio.ensure_future(read(one.stream(asked(40))))
        await asyncio.wait_for(line.arrived.wait(), 20)
        reply = await one.ingress.abort(pb.AbortRequest(request_id="r"), METADATA)
        assert reply.aborted
        line.let_through.set()
        received = await reading
        assert received.reason() == "abort"
        assert not received.tokens
        assert one.leaders["g0"].loads().prompt_tokens_total == 0


async def test_withdrawing_does_not_touch_a_newer_request_of_the_same_id() -> None:
    async with machine() as one:
        request = PlaceRequest("tenant/r", 20, 20)
        first = await one.router.place(request, ticket="a")
        await one.router.release(first.lease.lease_id)
        second = await one.router.place(request, ticket="b")
        await one.router.withdraw("tenant/r", "a")
        assert (await one.router.status()).live_requests == 1
        await one.router.release(second.lease.lease_id)


async def test_withdrawing_ends_what_the_call_led_to() -> None:
    async with machine() as one:
        await one.router.place(PlaceRequest("tenant/r", 20, 20), ticket="a")
        await one.router.withdraw("tenant/r", "a")
        status = await one.router.status()
        assert (status.live_requests, status.router.leases) == (0, 0)
        one.router.granted.clear()  # it was given back by the router itself


async def test_an_abort_in_the_moment_of_the_grant_holds() -> None:
    async with machine() as one:
        held = [
            await one.router.place(PlaceRequest(f"tenant/{i}", 20, 20), ticket="a")
            for i in range(4)
        ]
        waiting = asyncio.ensure_future(
            one.router.place(PlaceRequest("tenant/r", 20, 20), ticket="a")
        )
        async with asyncio.timeout(20):
            while (await one.router.status()).router.queue_depth == 0:
                await asyncio.sleep(0)
        # Granted with this, but its caller has not been told when the abort comes.
        await one.router.release(held[0].lease.lease_id)
        assert (await one.router.status()).router.queue_depth == 0
        assert await one.router.abort("tenant/r")
        with pytest.raises(RequestAbortedError):
            await waiting
        for placement in held[1:]:
            await one.router.release(placement.lease.lease_id)


@pytest.mark.parametrize("way", ["aborted", "begun"])
async def test_what_a_dead_ingress_held_is_free_with_the_next_reports(way: str) -> None:
    """Also what came and went between two reports, and was never in one."""
    now = [0.0]
    async with machine() as one:
        config = RouterConfig()
        router = CountingRouter(one.lines, config, clock=lambda: now[0])
        await router.refresh()
        lease = (await router.place(PlaceRequest("tenant/r", 20, 20), ticket="a")).lease
        leader = one.leaders["g0"]
        await one.lines["g0"].submit(
            EngineRequest(
                request_id=sequence_id(lease.lease_id, 0),
                client_id="dead",
                prompt_token_ids=np.arange(20, dtype=np.int32),
                params=SamplingParams(max_tokens=20),
                lease=lease.share,
            ),
            leader.info().epoch,
        )
        if way == "aborted":
            assert await router.abort("tenant/r")
        else:
            await router.begun(lease.lease_id)
        one.allow(MANY)
        await asyncio.wait_for(leader._idle.wait(), 20)
        await router.refresh()
        assert (await router.status()).router.leases == 1, "a report may be older than the lease"
        now[0] += config.grace_s
        assert now[0] < config.lease_ttl_s
        await router.refresh()
        assert (await router.status()).router.leases == 0


async def test_a_group_that_came_up_a_moment_ago_serves_at_once() -> None:
    async with machine(groups=2) as two:
        status = two.ingress._status
        assert status is not None
        two.allow(MANY)
        for number in range(2):
            # As before either group had reported: whichever is chosen is not known yet.
            known = {g: r for g, r in status.reports.items() if g == f"g{number}"}
            two.ingress._status = replace(status, reports=known)
            request = asked(5, request_id=str(number))
            received = await read(two.stream(request))
            assert received.started is not None


async def test_a_lease_on_a_group_that_stays_unknown_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with machine(groups=2) as two:
        status = two.ingress._status
        assert status is not None

        async def nothing_new() -> None: ...

        monkeypatch.setattr(two.ingress, "refresh", nothing_new)
        for name in ("g0", "g1"):
            known = {g: r for g, r in status.reports.items() if g != name}
            two.ingress._status = replace(status, reports=known)
            with contextlib.suppress(NotReadyError):
                two.allow(50)
                await read(two.stream(asked(5)))
        await two.settled()
        two.ingress._status = status
        found = await two.router.status()
        assert (found.live_requests, found.router.leases) == (0, 0)
        two.router.given_back = Counter(p.lease.lease_id for p in two.router.granted)


# Restarts


async def test_a_new_router_takes_over_all_choices_of_a_lease() -> None:
    async with machine() as one:
        stream = one.stream(asked(700, n=3))
        one.allow(8)
        received = await read_until(stream, 3)
        await accounted(one, 3)
        held = (await one.router.status()).router.groups[0]
        new = CountingRouter(one.lines, RouterConfig())
        await new.refresh()
        found = (await new.status()).router
        assert found.leases == 1
        assert found.groups[0].sequences == held.sequences == 3
        assert found.groups[0].hot_pages_used == held.hot_pages_used
        assert found.groups[0].sealed_pages_used == held.sealed_pages_used
        one.allow(MANY)
        await rest_of(stream, received)
        await new.refresh()
        assert (await new.status()).router.leases == 0


async def test_a_lease_goes_on_growing_under_a_new_router() -> None:
    async with machine(config=EAGER) as one:
        one.allow(MANY)
        await answered(one, 20, "teacher")
        one.router.hold_grow.clear()
        stream = one.stream(asked(200))
        received = await read_until(stream, 2 * PAGE - len(PROMPT))
        await accounted(one, 1)
        # The router dies: what it knew is gone, and the engines tell the new one.
        placed, granted = one.router.placed[-1], one.router.granted[-1]
        new = CountingRouter(one.lines, EAGER)
        await new.refresh()
        growth = await new.grow(granted.lease.lease_id, placed, 60)
        assert growth is not None
        assert growth.lease.sealed_pages >= (len(PROMPT) + 60) // PAGE
        one.router.hold_grow.set()
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 200)


# Prefixes


async def test_engines_tell_a_router_which_blocks_they_hold() -> None:
    async with machine(groups=2) as two:
        two.allow(MANY)
        prompt = [(7 * i) % 50 for i in range(20 * PAGE)]
        first = await read(two.stream(asked(3, prompt=prompt)))
        assert first.started is not None
        new = CountingRouter(two.lines, RouterConfig())
        for _ in range(2):  # what comes with a group's first report counts for nothing yet
            await new.refresh()
        request = replace(two.router.placed[0], request_id="tenant/again")
        placement = await new.place(request, ticket="a")
        assert placement.group == first.started.group
        assert placement.cached_tokens == 16 * PAGE  # two blocks; four pages are no whole block
        await new.release(placement.lease.lease_id)
        salted = asked(3, prompt=prompt, request_id="s")
        salted.cache_salt = "other"
        await read(two.stream(salted))
        assert not set(two.router.placed[0].page_hashes) & set(two.router.placed[1].page_hashes)


async def test_leases_with_the_same_prompt_share_its_pages() -> None:
    """More of them than would fit if each paid for all of it, and no engine refuses."""
    async with machine(groups=1) as one:
        total = one.leaders["g0"].info().sealed_pages
        prompt = [(7 * i) % 50 for i in range(25 * PAGE)]
        requests = [asked(100, prompt=prompt, request_id=str(i)) for i in range(4)]
        reads = [asyncio.ensure_future(read(one.stream(request))) for request in requests]
        async with asyncio.timeout(20):
            while len(one.router.granted) < 4:
                await asyncio.sleep(0)
        one.allow(MANY)
        for received in await asyncio.gather(*reads):
            assert received.tokens[0] == answer(prompt, 100)
            assert received.usage is not None
            assert received.usage.preemptions == 0
        assert sum(placed.lease.sealed_pages for placed in one.router.granted) > 0
        assert len(one.router.placed) == 4, f"a pool of {total} was asked more than once"


async def test_what_was_aborted_before_it_came_is_remembered_for_a_while() -> None:
    async with machine() as one:
        service = one.services["g0"]
        await service.abort([f"gone.{i}" for i in range(2 * ABORTED_LIMIT)])
        assert len(service._aborted) == ABORTED_LIMIT
