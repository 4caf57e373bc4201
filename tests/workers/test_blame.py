"""Which sequences are blamed when an engine fails, and who waits while a suspect is tried."""

from __future__ import annotations

import pytest

from kvmesh.workers.blame import Blame
from kvmesh.workers.channel import Failed
from kvmesh.workers.errors import RankRaisedError, WorkerDiedError
from kvmesh.workers.leader import FAILED_TWICE
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.request import EndReason
from tests.workers.test_engine import PAGE, make_engine, request
from tests.workers.test_leader import ENDLESS, Inbox, running

RAISED, DIED = RankRaisedError("IndexError: 50"), WorkerDiedError("rank 0 was killed")
STEP = frozenset({"a", "b"})
ERROR, FAULT, CLEARED = EndReason.ERROR, EndReason.FAULT, EndReason.CLEARED


@pytest.mark.parametrize(
    ("blame", "error", "a", "b", "waiting"),
    [
        (Blame(), RAISED, ERROR, ERROR, ERROR),
        (Blame(STEP), RAISED, ERROR, ERROR, CLEARED),
        (Blame(STEP), DIED, ERROR, ERROR, CLEARED),
        (Blame(STEP, "a", 1), RAISED, FAULT, CLEARED, CLEARED),
        (Blame(STEP, "a", 1), IndexError("50"), FAULT, CLEARED, CLEARED),
        (Blame(STEP, "a", 1), DIED, ERROR, CLEARED, CLEARED),
        (Blame(STEP, "a", 2), DIED, FAULT, CLEARED, CLEARED),
    ],
)
def test_how_sequences_end(
    blame: Blame, error: Exception, a: EndReason, b: EndReason, waiting: EndReason
) -> None:
    assert [blame.end_of(name, error) for name in ("a", "b", "waiting")] == [a, b, waiting]


def test_a_step_puts_its_suspect_on_trial() -> None:
    engine, _ = make_engine()
    engine.add(request("a", [3] * 4))
    engine.add(request("b", [4] * 4, suspicion=2))
    innocent, suspect = engine._live.values()
    assert Blame.of([innocent]) == Blame(frozenset({"a"}))
    assert Blame.of([innocent, suspect]) == Blame(STEP, "b", 2)


@pytest.mark.parametrize("where", ["submit", "result"])
def test_a_step_that_fails_on_its_way_or_in_the_ranks_is_blamed_on_its_sequences(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, executor = make_engine(seqs=1)

    def fails(_: object) -> None:
        raise RankRaisedError("IndexError: 50")

    monkeypatch.setattr(executor, where, fails)
    engine.add(request("aboard", [3] * 4), request("waits", [4] * 4))
    with pytest.raises(RankRaisedError):
        engine.step()
    assert engine.blame == Blame(frozenset({"aboard"}))


def test_a_rank_that_has_lost_another_is_not_the_one_that_raised() -> None:
    assert isinstance(Failed("RuntimeError", "x").error(), RankRaisedError)
    assert not isinstance(Failed("WorkerDiedError", "x").error(), RankRaisedError)


def test_others_overtake_a_suspect_that_waits_for_its_trial() -> None:
    engine, _ = make_engine(tokens=3 * PAGE + 5)
    engine.add(request("tried", [3] * 3 * PAGE, suspicion=1))
    engine.add(request("waits", [4] * 3, suspicion=1))
    engine.add(request("other", [5] * 3))
    engine.step()
    names = [seq.request.request_id for seq in engine.scheduler.running]
    assert names == ["tried", "other"]
    engine.step()  # the first one has proved itself
    names = [seq.request.request_id for seq in engine.scheduler.running]
    assert names == ["tried", "waits", "other"]


def test_a_suspect_that_waits_for_its_lease_does_not_keep_others_from_their_trial() -> None:
    engine, _ = make_engine(tokens=64)
    engine.add(request("paused", [3] * 40, lease=LeaseTerms("l", 1, 4, 0, 6), suspicion=1))
    engine.add(request("next", [4] * 40, 3, suspicion=1))
    ended = []
    while not engine.stalled:
        ended += [x for x in engine.step() if x.finish_reason is not None]
    assert [delta.request_id for delta in ended] == ["next"]


def test_steps_are_computed_alone_until_a_suspect_has_ended_untried() -> None:
    engine, _ = make_engine(in_flight=2)
    engine.add(request("suspect", [3] * 3 * PAGE, suspicion=1))
    engine.add(request("other", [4] * 4))
    engine.step()
    assert not engine.awaits_result
    engine.abort("suspect")
    engine.step()
    assert engine.awaits_result, "nobody is on trial any more"


async def test_the_leader_ends_each_sequence_as_it_may_have_caused_the_failure() -> None:
    async with running() as (leader, executor):
        inbox = Inbox()
        first = request("first", [3] * 14, params=ENDLESS, suspicion=1)
        leader.submit([first], inbox.deliver)
        executor.allow(1)
        await inbox.take()  # it has proved itself
        names = ["first", "tried", "waits"]
        for name in names[1:]:
            leader.submit([request(name, [4] * 30, params=ENDLESS, suspicion=1)], inbox.deliver)
        executor.allow(1)  # in flight since before the others came, so without them
        await inbox.take()
        executor.error = RankRaisedError("IndexError: 50")
        executor.allow(1)
        read = await inbox.until_end(set(names))
    ends = {name: deltas[-1].finish_reason for name, deltas in read.items()}
    assert ends == {"first": CLEARED, "tried": FAULT, "waits": CLEARED}
    assert read["tried"][-1].error == FAILED_TWICE
    assert read["first"][-1].error == "IndexError: 50"
