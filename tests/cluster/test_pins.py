"""Pinned prompts, from a request to its usage, through ingress, router and engines."""

from __future__ import annotations

import pytest

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from tests.cluster.machine import Machine, machine
from tests.cluster.test_generation import make_request, read
from tests.workers.test_engine import PAGE
from tests.workers.test_leader import MANY

DOCUMENT = [(i * i + 3 * i) % 40 for i in range(24 * PAGE)]


async def usage_of(built: Machine, request: pb.GenerateRequest) -> pb.Usage:
    received = await read(built.stream(request))
    assert received.usage is not None
    return received.usage


def pinning(prompt: list[int], pin_s: float, name: str = "pin") -> pb.GenerateRequest:
    request = make_request(0, prompt=prompt, request_id=name)
    request.pin_s = pin_s
    return request


async def fill(built: Machine, count: int, first: int = 0) -> None:
    """Prompts of others that take all pages several times, one after the other."""
    for number in range(first, first + count):
        prompt = [number % 50, number // 50, *[7] * (40 * PAGE)]
        await read(built.stream(make_request(2, prompt=prompt, request_id=f"other {number}")))


async def test_a_pinned_document_stays_while_others_come_and_go() -> None:
    async with machine(groups=1) as one:
        one.allow(MANY)
        pinned = await usage_of(one, pinning(DOCUMENT, 3600.0))
        assert (pinned.pinned_tokens, pinned.completion_tokens) == (len(DOCUMENT), 0)
        await fill(one, 24)
        asked = await usage_of(one, make_request(3, prompt=[*DOCUMENT, 5], request_id="question"))
        assert (asked.cached_tokens, asked.pinned_tokens) == (len(DOCUMENT), 0)
        loads = one.leaders["g0"].account.loads
        assert (loads.pinned_pages, loads.pinned_evictions_total) == (24, 0)
        await usage_of(one, pinning(DOCUMENT, 0.0, "end"))
        await one.at_rest()
        assert one.leaders["g0"].account.loads.pinned_pages == 0


async def test_a_pin_expires_while_nothing_runs() -> None:
    async with machine(groups=1) as one:
        one.allow(MANY)
        assert (await usage_of(one, pinning(DOCUMENT, 0.05))).pinned_tokens == len(DOCUMENT)
        await one.until(lambda: one.leaders["g0"].account.loads.pinned_pages == 0)


async def test_a_question_goes_to_the_group_that_keeps_the_document() -> None:
    async with machine(groups=2) as two:
        two.allow(MANY)
        where = (await usage_of(two, pinning(DOCUMENT, 3600.0))).group
        for number in range(3):
            await two.at_rest()
            question = make_request(2, prompt=[*DOCUMENT, number], request_id=f"q{number}")
            usage = await usage_of(two, question)
            assert (usage.group, usage.cached_tokens) == (where, len(DOCUMENT))


async def test_pins_of_one_tenant_have_a_bound_and_requests_do_not_wait_for_them() -> None:
    async with machine(groups=1, budget=130) as one:
        one.allow(MANY)
        info = one.leaders["g0"].account.info
        pages = info.max_pinned_pages
        assert 0 < pages < info.capacity.sealed // 2
        most = [(i * i) % 41 for i in range(pages * PAGE)]
        assert (await usage_of(one, pinning(most, 3600.0))).pinned_tokens == len(most)
        beyond = await usage_of(one, pinning(DOCUMENT[: 2 * PAGE], 3600.0, "beyond"))
        assert beyond.pinned_tokens == 0, "there is no room for another"
        longest = info.geometry.tokens_within(info.capacity.sealed)
        whole = make_request(2, prompt=[9] * (min(longest, 800) - 3), request_id="whole")
        assert (await usage_of(one, whole)).completion_tokens == 2
        with pytest.raises(InvalidFieldError, match="the pins of a tenant hold at most") as caught:
            await usage_of(one, pinning([*most, *[1] * PAGE], 60.0, "never"))
        assert caught.value.field == "pin_s"


async def test_what_is_not_cached_cannot_be_pinned() -> None:
    async with machine(groups=1) as one:
        one.allow(MANY)
        for report in one.router.status().reports.values():
            object.__setattr__(report.info, "max_pinned_pages", 0)
        await one.ingress.refresh()
        with pytest.raises(UnsupportedFieldError, match="nothing is cached after a request"):
            await usage_of(one, pinning(DOCUMENT, 60.0))
