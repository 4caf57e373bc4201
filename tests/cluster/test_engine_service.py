"""An engine's process: what it accepts from ingresses, and how it drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from msgspec import structs

from kvmesh.cluster import engine_service as engine_service_module
from kvmesh.cluster.engine_service import EngineService, _Ingress, _request
from kvmesh.cluster.errors import EngineLostError
from kvmesh.cluster.link import Address, LinkError
from kvmesh.cluster.messages import (
    Deltas,
    End,
    NewSequence,
    Rejected,
    Report,
    Submit,
    Withdraw,
)
from kvmesh.cluster.routing.errors import RequestAbortedError
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.meters import EngineMeters
from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.errors import EngineError, InvalidFieldError
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.request import EndReason, EngineRequest, PinTerms, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams
from tests.cluster.machine import IDENTITY, PATIENCE_S, SeenMeters, answer
from tests.workers.test_leader import CONFIG, MANY, GatedExecutor

PROMPT = [3, 14, 15, 9, 26]


class Far:
    """The other end of a connection: what it was sent."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)

    def close(self) -> None: ...

    def deltas(self) -> list[SequenceDelta]:
        return [x for message in self.sent if isinstance(message, Deltas) for x in message.deltas]

    def rejections(self) -> list[tuple[str, Exception]]:
        found = (message for message in self.sent if isinstance(message, Rejected))
        return [(message.lease_id, message.failure.error) for message in found]


class Running:
    """An engine's service that reports when it is asked, and ingresses that the test plays."""

    def __init__(self) -> None:
        self.executor = GatedExecutor()
        self.meters = SeenMeters()

        async def find() -> Address:
            raise LinkError("not known")

        self.service = EngineService(
            "g0", CONFIG, self.executor, EngineMeters(self.meters, "g0"), IDENTITY, find,
            report_period_s=1000.0,
        )  # fmt: skip

    def ingress(self) -> tuple[_Ingress, Far]:
        far = Far()
        return _Ingress(self.service, far), far  # type: ignore[arg-type]

    def router(self) -> Far:
        far = Far()
        self.service._account._connected(far)  # type: ignore[arg-type]
        far.sent.clear()
        return far

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(0)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    made = Running()
    await made.service.start()
    yield made
    made.executor.allow(MANY)
    await made.service.stop()


def submission(lease_id: str, *outputs: list[int], max_tokens: int = 20) -> Submit:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    sequences = [
        NewSequence(f"{lease_id}.{index}", params, np.array(output, "<i4").tobytes())
        for index, output in enumerate(outputs)
    ]
    count = len(sequences)
    lease = LeaseTerms(lease_id, 1, count, 2 * count, 2 * count, sequences=count)
    return Submit(lease, np.array(PROMPT, "<i4").tobytes(), tuple(sequences))


def ended(far: Far) -> dict[str, EndReason]:
    return {x.request_id: x.finish_reason for x in far.deltas() if x.finish_reason is not None}


async def test_sequences_continue_where_their_output_stops(running: Running) -> None:
    running.executor.allow(MANY)
    (ingress, far), (_, other) = running.ingress(), running.ingress()
    expected = answer(PROMPT, 20)
    ingress.received(submission("l", [], expected[:7]))
    await running.until(lambda: len(ended(far)) == 2)
    assert ended(far) == {"l.0": EndReason.LENGTH, "l.1": EndReason.LENGTH}
    for name, tokens in (("l.0", expected), ("l.1", expected[7:])):
        own = (delta for delta in far.deltas() if delta.request_id == name)
        assert [token for delta in own for token in delta.token_ids] == tokens
    assert other.sent == []
    assert running.meters.of(table.SEQUENCE_QUEUE, "g0") == 2, "each is measured once"


def test_the_engine_gets_all_that_an_ingress_says_of_a_sequence() -> None:
    sequence = NewSequence("l.0", SamplingParams(seed=7), np.array([8, 9], "<i4").tobytes(), 3)
    message = structs.replace(
        submission("l", []),
        sequences=(sequence,),
        timeout_s=4.0,
        cache_salt="salt",
        suspicion=1,
        constraint=OutputConstraint("grammar"),
        pin=PinTerms("owner", 5.0),
    )
    made = _request(message, sequence)
    assert made.prompt_token_ids.tolist() == [*PROMPT, 8, 9]
    assert made == EngineRequest(
        "l.0",
        made.prompt_token_ids,
        SamplingParams(seed=7),
        message.lease,
        resumed_tokens=2,
        timeout_s=4.0,
        cache_salt="salt",
        suspicion=1,
        constraint=OutputConstraint("grammar"),
        scored_tokens=3,
        pin=PinTerms("owner", 5.0),
    )


async def test_sequences_end_when_it_is_asked_for_and_with_their_ingress(
    running: Running,
) -> None:
    (ingress, far), (stays, others) = running.ingress(), running.ingress()
    ingress.received(submission("a", [], []))
    stays.received(submission("b", []))
    running.executor.allow(2)
    await running.until(lambda: len(far.deltas()) > 1)
    ingress.received(End(["a.0", "gone"], EndReason.STOP))
    ingress.lost()
    running.executor.allow(MANY)
    await running.until(lambda: len(ended(others)) == 1 and len(ended(far)) == 2)
    assert ended(far) == {"a.0": EndReason.STOP, "a.1": EndReason.ABORT}
    assert ended(others) == {"b.0": EndReason.LENGTH}


async def test_what_cannot_be_accepted_is_rejected_with_the_reason(running: Running) -> None:
    ingress, far = running.ingress()
    running.service._account.received(Withdraw(("withdrawn",)))
    ingress.received(submission("withdrawn", []))
    ingress.received(submission("invalid", [99]))
    running.service.leader.submit = None  # type: ignore[method-assign, assignment]
    ingress.received(submission("bug", []))
    reasons = {name: type(error) for name, error in far.rejections()}
    assert reasons == {
        "withdrawn": RequestAbortedError,
        "invalid": InvalidFieldError,
        "bug": EngineError,
    }
    assert str(dict(far.rejections())["bug"]) == "internal error"
    del running.service.leader.submit
    assert far.deltas() == []


async def test_an_engine_that_drains_says_so_at_once_and_ends_what_runs(running: Running) -> None:
    ingress, far = running.ingress()
    ingress.received(submission("l", []))
    running.executor.allow(2)
    await running.until(lambda: len(far.deltas()) > 0)
    router = running.router()
    draining = asyncio.create_task(running.service.drain(PATIENCE_S))
    await asyncio.sleep(0)
    reports = [message.report for message in router.sent if isinstance(message, Report)]
    assert [report.draining for report in reports] == [True]
    await asyncio.sleep(0)
    ingress.received(submission("late", []))
    ((late, error),) = far.rejections()
    assert late == "late"
    assert isinstance(error, EngineLostError), "the request moves to another group"
    assert not draining.done()
    running.executor.allow(MANY)
    await asyncio.wait_for(draining, PATIENCE_S)
    assert ended(far) == {"l.0": EndReason.LENGTH}


async def test_a_drain_ends_when_its_time_is_over(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_service_module, "HAND_OVER_S", 0.1)  # of which it takes all
    ingress, far = running.ingress()
    ingress.received(submission("l", []))
    running.executor.allow(2)
    await running.until(lambda: running.executor.started == 3)
    await asyncio.wait_for(running.service.drain(0.0), PATIENCE_S)
    assert ended(far) == {}
    running.executor.allow(MANY)


async def test_an_engine_that_the_router_no_longer_hears_of_is_unhealthy(running: Running) -> None:
    running.service.check_health()
    following, reporting = running.service._account._tasks
    reporting.cancel()
    await asyncio.wait([reporting])
    running.service.check_health()  # it has left
    running.service._account._tasks = [following, asyncio.create_task(_fails())]
    await asyncio.wait(running.service._account._tasks[1:])
    with pytest.raises(EngineLostError):
        running.service.check_health()


async def _fails() -> None:
    raise ValueError("not known to it")


async def test_an_engine_that_has_failed_is_unhealthy_and_counts_as_lost(running: Running) -> None:
    running.service.check_health()
    ingress, far = running.ingress()
    running.executor.error = RuntimeError("broken")
    ingress.received(submission("l", []))
    running.executor.allow(1)
    await running.until(lambda: len(ended(far)) == 1)
    with pytest.raises(EngineLostError):
        running.service.check_health()
    ingress.received(submission("again", []))
    ((again, error),) = far.rejections()
    assert again == "again"
    assert isinstance(error, EngineLostError)
