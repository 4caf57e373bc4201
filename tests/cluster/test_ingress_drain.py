"""Which calls an ingress waits for before it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvmesh.cluster.errors import DrainingError
from kvmesh.cluster.telemetry import table
from kvmesh.v1 import kvmesh_pb2 as pb
from tests.cluster.machine import PATIENCE_S, TENANT, Machine, machine
from tests.cluster.test_generation import PROMPT, make_request, read_until, rest_of
from tests.workers.test_leader import MANY

TEXT = pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT))


@pytest.mark.parametrize(
    "call",
    [
        lambda ingress: ingress.generate(make_request(5), TENANT),
        lambda ingress: ingress.questions.tokenize(pb.TokenizeRequest(prompt=TEXT), TENANT),
        lambda ingress: ingress.questions.estimate_budget(
            pb.EstimateBudgetRequest(prompt=TEXT), TENANT
        ),
    ],
)
async def test_calls_whose_prompt_is_being_tokenised_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], Awaitable[Any]]
) -> None:
    async with machine() as built:
        built.allow(MANY)
        ingress = built.ingress
        arrived, proceed = hold_prompts(monkeypatch, built)
        answering = asyncio.ensure_future(call(ingress))
        await arrived.wait()
        ingress._measure()
        assert built.meters.of(table.OPEN_CALLS) == 1
        draining = asyncio.create_task(ingress.drain(PATIENCE_S))
        await built.until(lambda: not ingress.ready)
        for _ in range(9):
            await asyncio.sleep(0)
        assert not draining.done()
        with pytest.raises(DrainingError):
            await call(ingress)
        proceed.set()
        await draining
        for _ in range(9):
            await asyncio.sleep(0)
        assert answering.done() and await answering
        ingress._measure()
        assert built.meters.of(table.OPEN_CALLS) == 0


async def test_a_request_can_be_aborted_while_an_ingress_drains() -> None:
    async with machine() as built:
        stream = built.stream(make_request(600))
        built.allow(5)
        received = await read_until(stream, 3)
        draining = asyncio.create_task(built.ingress.drain(PATIENCE_S))
        await built.until(lambda: not built.ingress.ready)
        abort = pb.AbortRequest(request_id="r")
        assert (await built.ingress.questions.abort(abort, TENANT)).aborted
        await built.permit_end()
        assert (await rest_of(stream, received)).reason() == "abort"
        await draining


def hold_prompts(
    monkeypatch: pytest.MonkeyPatch, built: Machine
) -> tuple[asyncio.Event, asyncio.Event]:
    """Whether one has arrived, and whether they may continue."""
    arrived, proceed = asyncio.Event(), asyncio.Event()
    encode = built.ingress._prompts.encode

    async def held(*arguments: Any) -> Any:
        arrived.set()
        await proceed.wait()
        return await encode(*arguments)

    monkeypatch.setattr(built.ingress._prompts, "encode", held)
    return arrived, proceed
