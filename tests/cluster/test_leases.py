"""Leases of live requests: settled between engine and router from arrival to end, grown ahead
of the output, learned from; and engines' reports of the pages that they hold."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from kvmesh.cluster import account_link, router_service
from kvmesh.cluster.drain import RouterCalls, RouterContact
from kvmesh.cluster.errors import DrainingError, EngineLostError
from kvmesh.cluster.link import Address, connect
from kvmesh.cluster.messages import (
    TO_ENGINE_FROM_ROUTER,
    AccountNews,
    Hello,
    Place,
    Rejected,
    Release,
    Replaced,
    Report,
)
from kvmesh.cluster.reports import EngineReport
from kvmesh.cluster.routing.config import RouterConfig, RouterTuning
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.lease import AccountUpdate, LeaseTerms, PageChanges
from kvmesh.workers.loads import EngineLoads
from tests.cluster.machine import (
    IDENTITY,
    PATIENCE_S,
    TENANT,
    Machine,
    answer,
    machine,
    scripted_ingress,
)
from tests.cluster.test_generation import PROMPT, Received, make_request, read, read_until, rest_of
from tests.workers.test_engine import PAGE
from tests.workers.test_leader import MANY

# One sample is enough to learn from: leases are small from the second request on.
EAGER = RouterConfig(tuning=RouterTuning(min_samples=1), lease_ttl_s=1000.0)


async def run_request(built: Machine, max_tokens: int, request_id: str) -> None:
    """A request that the router learns from."""
    await read(built.stream(make_request(max_tokens, request_id=request_id)))


async def teach_router(built: Machine) -> None:
    """Let the router learn an output of 20 tokens."""
    built.allow(MANY)
    await run_request(built, 20, "teacher")
    await built.until(lambda: built.router.learned == [20])


def check_engines_within_ledger(built: Machine) -> None:
    """No engine holds more than the ledger has leased there."""
    ledger = {group.group: group for group in built.router.status().router.groups}
    for name, leader in built.leaders.items():
        assert leader.account.loads.pool.used.fits(ledger[name].used)


async def test_a_lease_covers_what_was_learned_and_grows_with_the_output() -> None:
    async with machine(config=EAGER) as one:
        await teach_router(one)
        received = await read(one.stream(make_request(300)))
        assert received.tokens[0] == answer(PROMPT, 300)
        first, second = one.router.granted
        assert first.lease.sealed_pages == first.lease.max_sealed_pages
        assert second.leased_output_tokens == 20
        assert second.lease.sealed_pages == (len(PROMPT) + 20) // PAGE
        # Each growth is by half, not by a page.
        assert 2 <= one.router.grown[second.lease.lease_id] <= 8
        assert one.engines["g0"].extended[-1].sealed_pages <= second.lease.max_sealed_pages
        assert received.usage is not None
        assert received.usage.kv_sealed_pages == (len(PROMPT) + 299) // PAGE
        assert received.started is not None
        assert received.started.kv_reserved_bytes < received.usage.kv_reserved_bytes
        await one.until(lambda: one.router.learned == [20, 300])
        assert one.router.first_tokens[second.lease.lease_id] == 1


async def test_an_engine_pauses_a_request_that_has_used_up_its_lease() -> None:
    async with machine(config=EAGER) as one:
        await teach_router(one)
        one.router.withhold_growth()
        stream = one.stream(make_request(200))
        # The lease is for one sealed page: two pages, less the token that would fill the second.
        received = await read_until(stream, 2 * PAGE - len(PROMPT))
        await one.until(lambda: one.leaders["g0"].account.loads_current)
        check_engines_within_ledger(one)
        assert one.leaders["g0"].account.loads.running == 1
        # Another request runs meanwhile.
        await run_request(one, 10, "other")
        one.router.resume_growth()
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 200)
        assert received.usage is not None
        assert received.usage.preemptions == 0


async def test_a_growth_waits_until_pages_are_free() -> None:
    async with machine(config=EAGER, budget=80) as one:
        await teach_router(one)
        other = await scripted_ingress(one)
        # An older lease that may still grow, and one that leaves just the pages for that.
        request = PlaceRequest("tenant/old", len(PROMPT), 300, tenant="tenant", sequences=2)
        old = await other.place(request, 1)
        to_grow = old.lease.max_sealed_pages - old.lease.sealed_pages
        spare_pages = one.free_sealed_pages() - to_grow - 1
        await other.place(PlaceRequest("tenant/filler", spare_pages * PAGE, 1), 2)
        stream = one.stream(make_request(200))
        received = await read_until(stream, 2 * PAGE - len(PROMPT))
        lease_id = one.router.granted[-1].lease.lease_id
        await one.until(lambda: one.router.wanted[lease_id] == 1)
        assert one.router.grown[lease_id] == 0
        # The loads are of the last report.
        await one.until(lambda: one.leaders["g0"].account.loads.running == 1)
        other.router.send(Release(old.lease.lease_id))
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 200)
        assert one.router.grown[lease_id] >= 1
        other.router.send(Release(one.router.granted[2].lease.lease_id))
        await one.until(lambda: one.leases() == 0)
        other.die()


async def test_a_client_that_does_not_read_does_not_delay_its_lease() -> None:
    async with machine(config=EAGER) as one:
        await teach_router(one)
        stream = one.stream(make_request(200))
        assert (await anext(stream)).HasField("started")
        received = Received()
        received.started = pb.Started()
        received.take(await anext(stream))
        await asyncio.wait_for(one.leaders["g0"]._idle.wait(), PATIENCE_S)
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 200)
        assert received.deltas < 10


async def test_all_choices_of_a_lease_grow_together() -> None:
    async with machine(config=EAGER) as one:
        await teach_router(one)
        received = await read(one.stream(make_request(120, n=3)))
        assert received.tokens == {i: answer(PROMPT, 120) for i in range(3)}
        lease = one.router.granted[-1].lease
        assert one.router.grown[lease.lease_id] >= 1
        await one.until(lambda: one.router.learned[-1] == 120)


async def test_only_natural_ends_are_learned_from() -> None:
    async with machine() as one:
        stream = one.stream(make_request(60))
        one.allow(6)
        received = await read_until(stream, 4)
        reply = await one.ingress.questions.abort(pb.AbortRequest(request_id="r"), TENANT)
        assert reply.aborted
        await one.permit_end()
        await rest_of(stream, received)
        await one.until(lambda: one.router.learned == [None])


# Ends between placement and submission


async def test_an_abort_between_placement_and_submission_takes_effect() -> None:
    async with machine() as one:
        one.allow(MANY)
        engine = one.engines["g0"]
        engine.hold()
        reading = asyncio.ensure_future(read(one.stream(make_request(40))))
        await asyncio.wait_for(engine.arrived.wait(), PATIENCE_S)
        reply = await one.ingress.questions.abort(pb.AbortRequest(request_id="r"), TENANT)
        assert reply.aborted
        await one.until(lambda: one.leases() == 0)
        engine.deliver_held()
        received = await reading
        assert received.reason() == "abort"
        assert not received.tokens
        assert one.leaders["g0"].account.loads.prompt_tokens_total == 0


async def test_an_ingress_that_dies_while_its_request_waits_leaves_the_queue() -> None:
    async with machine() as one:
        scripted = await scripted_ingress(one)
        held = [(await scripted.place(PlaceRequest(f"t/{i}", 20, 20), i)).lease for i in range(4)]
        dying = await scripted_ingress(one)
        dying.router.send(Place(1, PlaceRequest("t/r", 20, 20)))
        await one.until(lambda: one.router.status().router.queue_depth == 1)
        dying.die()
        await one.until(lambda: one.router.status().router.queue_depth == 0)
        for lease in held:
            scripted.router.send(Release(lease.lease_id))


async def test_a_lease_whose_ingress_dies_before_it_submits_expires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(router_service, "TICK_S", 0.01)
    async with machine(config=RouterConfig(lease_ttl_s=0.2)) as one:
        ticking = asyncio.create_task(one.router.run())
        dying = await scripted_ingress(one)
        placed = await dying.place(PlaceRequest("t/r", 20, 20))
        dying.die()
        await one.until(lambda: one.leases() == 0)
        assert one.router.status().router.expired_total == 1
        late = await scripted_ingress(one)
        await late.submit(placed, 20)
        # A late submission is refused: its pages may belong to other leases by now.
        assert isinstance(await late.answer(), Rejected)
        late.die()
        ticking.cancel()
        one.router.lease_ends[placed.lease.lease_id] = 1  # its expiry was its end


@pytest.mark.parametrize("started", [False, True])
async def test_the_pages_of_a_dead_ingress_are_freed_at_once(started: bool) -> None:
    async with machine() as one:
        dying = await scripted_ingress(one)
        placed = await dying.place(PlaceRequest("tenant/r", 20, 600))
        await dying.submit(placed, 600)
        await one.until(lambda: len(one.leaders["g0"]._live) == 1)
        if started:
            one.allow(3)
            await one.until(lambda: one.router.first_tokens[placed.lease.lease_id] == 1)
        dying.die()

        def freed() -> bool:
            one.allow(1)
            return one.leases() == 0

        await one.until(freed)
        assert one.leaders["g0"].account.loads.outcomes_total == {"abort": 1}


# Restarts


async def test_a_new_router_takes_over_all_choices_of_a_lease() -> None:
    async with machine() as one:
        stream = one.stream(make_request(700, n=3))
        one.allow(8)
        received = await read_until(stream, 3)
        held = one.router.status().router.groups[0]
        new = await one.new_router()
        found = new.status().router
        assert found.leases == 1
        assert found.groups[0].sequences == held.sequences == 3
        assert found.groups[0].used == held.used
        one.allow(MANY)
        await rest_of(stream, received)


async def test_a_lease_continues_to_grow_under_a_new_router() -> None:
    async with machine(config=EAGER) as one:
        await teach_router(one)
        one.router.withhold_growth()
        stream = one.stream(make_request(200))
        received = await read_until(stream, 2 * PAGE - len(PROMPT))
        lease_id = one.router.granted[-1].lease.lease_id
        await one.until(lambda: one.router.wanted[lease_id] == 1)
        # The router dies before it grants the growth: the engine asks the new one.
        new = await one.new_router()
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 200)
        assert new.grown[lease_id] >= 1


async def test_a_waiting_request_is_sent_again_to_a_new_router() -> None:
    async with machine() as one:
        scripted = await scripted_ingress(one)
        for i in range(4):
            await scripted.place(PlaceRequest(f"t/{i}", 20, 20), i)
        one.allow(MANY)
        reading = asyncio.ensure_future(read(one.stream(make_request(30))))
        await one.until(lambda: one.router.status().router.queue_depth == 1)
        scripted.die()
        await one.new_router()  # what was granted and never submitted is forgotten
        received = await asyncio.wait_for(reading, PATIENCE_S)
        assert received.tokens[0] == answer(PROMPT, 30)


async def test_a_lease_of_a_previous_router_is_accepted_under_a_new_one() -> None:
    """Submitted to an engine that has already reported its leases to the new router."""
    async with machine() as one:
        scripted = await scripted_ingress(one)
        placed = await scripted.place(PlaceRequest("tenant/r", 20, 600))
        new = await one.new_router()
        assert one.leases() == 0
        await scripted.submit(placed, 600)
        await one.until(lambda: one.leases() == 1)
        assert new.status().router.groups[0].used.hot == placed.lease.hot_pages
        scripted.die()


# Prefixes


async def test_engines_report_to_a_router_which_blocks_they_hold() -> None:
    async with machine(groups=2) as two:
        two.allow(MANY)
        prompt = [(7 * i) % 50 for i in range(20 * PAGE)]
        first = await read(two.stream(make_request(3, prompt=prompt)))
        assert first.started is not None
        request = replace(two.router.placed[0], request_id="tenant/again")
        await two.at_rest()
        new = await two.new_router()
        scripted = await scripted_ingress(two)
        placed = await scripted.place(request)
        assert placed.group == first.started.group
        # Two blocks; the other four pages are not a whole block.
        assert new.granted[0].cached_tokens == 16 * PAGE
        scripted.router.send(Release(placed.lease.lease_id))
        salted = make_request(3, prompt=prompt, request_id="s")
        salted.cache_salt = "other"
        await read(two.stream(salted))
        assert not set(request.page_hashes) & set(new.placed[-1].page_hashes)


async def test_leases_with_the_same_prompt_share_its_pages() -> None:
    """More leases than would fit if each paid for the whole prompt, and no engine refuses one."""
    async with machine(groups=1) as one:
        prompt = [(7 * i) % 50 for i in range(25 * PAGE)]
        requests = [make_request(100, prompt=prompt, request_id=str(i)) for i in range(4)]
        reads = [asyncio.ensure_future(read(one.stream(request))) for request in requests]
        await one.until(lambda: len(one.router.granted) == 4)
        one.allow(MANY)
        for received in await asyncio.gather(*reads):
            assert received.tokens[0] == answer(prompt, 100)
            assert received.usage is not None
            assert received.usage.preemptions == 0
        assert sum(placed.lease.sealed_pages for placed in one.router.granted) > 0
        assert len(one.router.placed) == 4, "an engine has refused"


async def test_withdrawn_leases_are_remembered_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(account_link, "WITHDRAWN_LIMIT", 10)
    async with machine() as one:
        engine = one.engines["g0"]
        engine._account.withdraw(tuple(f"gone-{i}" for i in range(25)))
        assert [*engine._account.withdrawn] == [f"gone-{i}" for i in range(15, 25)]


class Zombie:
    """An engine that hung, and greets the router after its replacement."""

    def __init__(self, built: Machine, name: str) -> None:
        self.heard: list[object] = []
        self.lost_router = asyncio.Event()
        self._built, self._name = built, name

    async def greet(
        self, started_ns: int = 1, *, draining: bool = False, kv_format: str = ""
    ) -> None:
        """kv_format: if it is not that of the group's other engine"""
        address = await self._built.find_router()
        router = await connect(address, IDENTITY, TO_ENGINE_FROM_ROUTER, lambda _: self)
        info = self._built.leaders[self._name].account.info
        info = replace(info, epoch="zombie", kv_format=kv_format or info.kv_format)
        hung = LeaseTerms("hung", 1, 1, 1, 1)
        nothing = AccountUpdate(), PageChanges((), ())
        address = Address("127.0.0.1", 1)
        hello = Hello(self._name, started_ns, "n", draining, info, address, (hung,), *nothing)
        router.send(hello)
        router.send(AccountNews(AccountUpdate(arrived=(hung,)), nothing[1]))
        router.send(Report(EngineReport(info, EngineLoads()), audited=True))

    def received(self, message: object) -> None:
        self.heard.append(message)

    def lost(self) -> None:
        self.lost_router.set()


async def test_an_engine_that_returns_after_its_replacement_is_sent_away() -> None:
    async with machine() as one:
        zombie = Zombie(one, "g0")
        await zombie.greet()
        await asyncio.wait_for(zombie.lost_router.wait(), PATIENCE_S)
        assert zombie.heard == [Replaced()]
        status = one.router.status()
        assert (status.router.leases, status.audit_faults_total) == (0, 0)
        assert status.reports["g0"].info.epoch == one.leaders["g0"].account.info.epoch
        one.allow(MANY)
        await run_request(one, 20, "r")


async def test_an_engine_that_connects_again_before_it_was_missed_is_not_replaced() -> None:
    async with machine() as one:
        first = one.router.groups["g0"].connection
        again = Zombie(one, "g0")
        await again.greet(one.engines["g0"]._account._started_ns)
        await one.until(lambda: first.closed)
        # The real engine is back too, and the last to come is the one that stays.
        await asyncio.wait_for(again.lost_router.wait(), PATIENCE_S)
        assert again.heard == []
        assert one.leaders["g0"].failed is None
        one.allow(MANY)
        await run_request(one, 20, "r")


async def test_an_engine_fails_when_it_hears_that_it_was_replaced() -> None:
    async with machine() as one:
        old = one.engines["g0"]
        stream = one.stream(make_request(60))
        one.allow(8)
        received = await read_until(stream, 4)
        await one.replace_engine("g0")
        await one.until(lambda: old.leader.failed is not None)
        with pytest.raises(EngineLostError):
            old.check_health()
        one.allow(MANY)
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 60)
        await one.until(lambda: len(one.router.groups.names) == 1)
        assert one.router.groups["g0"].info == one.leaders["g0"].account.info


async def test_draining_refuses_new_requests_and_waits_for_running_ones() -> None:
    async with machine() as one:
        stream = one.stream(make_request(60))
        one.allow(8)
        received = await read_until(stream, 4)
        left: list[int] = []
        heard = asyncio.Event()
        loop = asyncio.get_running_loop()

        def report(live_requests: int) -> None:
            left.append(live_requests)
            loop.call_soon_threadsafe(heard.set)

        router = RouterContact(await one.find_router(), IDENTITY)
        calls = RouterCalls("no app")
        draining = asyncio.create_task(
            asyncio.to_thread(calls.drain, router, 60.0, threading.Event(), report)
        )
        await asyncio.wait_for(heard.wait(), PATIENCE_S)
        await one.until(lambda: one.router.status().draining)
        await one.ingress.refresh()
        with pytest.raises(DrainingError):
            await run_request(one, 5, "late")
        assert not draining.done()
        one.allow(MANY)
        await rest_of(stream, received)
        assert received.tokens[0] == answer(PROMPT, 60)
        await asyncio.wait_for(draining, PATIENCE_S)
        calls.close()
        assert set(left) == {1}


async def test_nothing_more_is_placed_on_an_engine_that_drains() -> None:
    async with machine(groups=2) as two:
        stream = two.stream(make_request(60))
        two.allow(8)
        received = await read_until(stream, 4)
        assert received.started is not None
        first = received.started.group
        draining = asyncio.create_task(two.engines[first].drain(1000.0))
        await two.until(lambda: first in two.router.reports.latest)
        await two.until(lambda: two.router.reports.latest[first].draining)
        two.allow(MANY)
        await asyncio.gather(*(run_request(two, 20, str(i)) for i in range(6)))
        assert [placed.group for placed in two.router.granted].count(first) == 1
        await rest_of(stream, received)
        await asyncio.wait_for(draining, PATIENCE_S)


async def test_a_hurried_drain_does_not_wait() -> None:
    async with machine() as one:
        stream = one.stream(make_request(60))
        one.allow(8)
        await read_until(stream, 4)
        hurry = threading.Event()
        router = RouterContact(await one.find_router(), IDENTITY)
        calls = RouterCalls("no app")
        waiting = asyncio.to_thread(calls.drain, router, 60.0, hurry, lambda _: hurry.set())
        await asyncio.wait_for(waiting, PATIENCE_S)
        calls.close()
        await stream.aclose()
