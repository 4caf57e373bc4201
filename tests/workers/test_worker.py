"""What a rank's process answers, and when it ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kvmesh.workers import worker
from kvmesh.workers.channel import (
    Allocated,
    Close,
    Divergences,
    Failed,
    Flush,
    FromRank,
    Probe,
    ToRank,
)
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.executor import Allocation, RankDescription
from kvmesh.workers.launched_step import LaunchedStep
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult, TableUpdate, TokenMasks

DESCRIPTION = RankDescription("m", "r", "float32", 50, 100, (1,), 0, 0, 4, 1, 100, 8)
NOTHING = TableUpdate([], [], [])
PLAN = StepPlan(1, [], [], NOTHING, NOTHING, [], [], [])
MASKED = StepPlan(2, [], [], NOTHING, NOTHING, [], [], [], masked=True)
MASKS = TokenMasks(2, [0], b"\1\0\0\0")
RESULT = StepResult(1, [SampledToken(7)], 0.0)


class ScriptedEnd:
    """The leader's messages, one after the other; None is a pause."""

    def __init__(self, messages: Sequence[ToRank | None]) -> None:
        self._messages = list(messages)
        self.sent: list[FromRank] = []
        self.closed = False
        self.calls: list[str] = []

    def receive(self, timeout_s: float) -> ToRank | None:
        assert 0 < timeout_s < 10, "a leader that is gone is noticed within seconds"
        return self._messages.pop(0)

    def send(self, message: FromRank) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self.closed = True

    @property
    def unread(self) -> int:
        return len(self._messages)


class FakeRank:
    """samples: whether this rank answers; runs_ahead: as a GPU does"""

    def __init__(self, *, samples: bool, runs_ahead: bool = False) -> None:
        self.samples, self.runs_ahead = samples, runs_ahead
        self.allocated: list[Allocation] = []
        self.calls: list[str] = []

    def describe(self) -> RankDescription:
        return DESCRIPTION

    def divergences(self, kv_formats: list[str]) -> list[float]:
        return [0.5] * len(kv_formats) if self.samples else []

    def allocate(self, allocation: Allocation) -> None:
        self.allocated.append(allocation)

    @property
    def runner(self) -> FakeRank:
        return self

    def launch(self, plan: StepPlan) -> LaunchedStep:
        assert plan in (PLAN, MASKED)
        self.calls.append("launch")
        return LaunchedStep(plan, 0.0, [], torch.empty(0))

    def sample(self, step: LaunchedStep, masks: TokenMasks | None = None) -> None:
        if self.samples:
            assert masks == (MASKS if step.plan.masked else None)
        self.calls.append("sample")

    def result(self, step: LaunchedStep) -> StepResult | None:
        self.calls.append("result")
        return RESULT if self.samples else None


def serve(
    messages: Sequence[ToRank | None], *, samples: bool, parent: int, runs_ahead: bool = False
) -> ScriptedEnd:
    """The rank's end, and in `calls` what the rank was asked to do after it was allocated."""
    end, rank = ScriptedEnd(messages), FakeRank(samples=samples, runs_ahead=runs_ahead)
    worker._serve(rank, end, parent)  # type: ignore[arg-type]
    assert rank.allocated == [x for x in messages if isinstance(x, Allocation)]
    end.calls = rank.calls
    return end


@pytest.mark.parametrize("samples", [True, False])
def test_a_rank_answers_what_it_is_asked_until_it_is_closed(samples: bool) -> None:
    asked = [Probe(["int4"]), Allocation(1, 2, 3, 4), None, PLAN, PLAN, Close(), PLAN]
    end = serve(asked, samples=samples, parent=os.getppid())
    assert end.unread == 1
    if samples:
        assert end.sent == [DESCRIPTION, Divergences([0.5]), Allocated(), RESULT, RESULT]
    else:
        assert end.sent == [DESCRIPTION, Allocated()]


ALLOCATE = Allocation(1, 2, 3, 4)


def test_a_rank_that_samples_waits_for_the_masks_and_starts_no_later_step_before() -> None:
    asked = [ALLOCATE, MASKED, None, PLAN, MASKS, Close()]
    end = serve(asked, samples=True, parent=os.getppid())
    assert end.sent == [DESCRIPTION, Allocated(), RESULT, RESULT]
    assert end.calls == ["launch", "sample", "launch", "sample", "result", "result"]
    others = serve([ALLOCATE, MASKED, PLAN, Close()], samples=False, parent=os.getppid())
    assert others.unread == 0 and others.calls == ["launch", "sample", "result"] * 2


def test_masks_without_a_step_end_a_rank() -> None:
    with pytest.raises(AssertionError, match="masks must follow"):
        serve([ALLOCATE, PLAN, MASKS], samples=True, parent=os.getppid())


def test_a_rank_that_runs_ahead_answers_a_step_after_it_has_launched_the_next_one() -> None:
    asked: list[ToRank] = [ALLOCATE, PLAN, PLAN, PLAN, Flush(), PLAN, Flush(), Flush(), Close()]
    end = serve(asked, samples=True, parent=os.getppid(), runs_ahead=True)
    launch, result = ["launch", "sample"], ["result"]
    expected = launch + (launch + result) * 2 + result + launch + result
    assert end.calls == expected
    assert end.sent == [DESCRIPTION, Allocated(), *[RESULT] * 4]
    # Of a masked step the rank launches the model before it waits for the tokens that masks need.
    masked = serve(
        [ALLOCATE, PLAN, MASKED, MASKS, Flush(), Close()],
        samples=True,
        parent=os.getppid(),
        runs_ahead=True,
    )
    assert masked.calls == ["launch", "sample", "launch", "result", "sample", "result"]


def test_a_rank_ends_when_its_leader_is_gone() -> None:
    assert serve([None, PLAN], samples=True, parent=os.getppid() + 1).unread == 1


def test_a_rank_returns_memory_after_loading_and_when_it_is_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    returned: list[int] = []  # how many messages were left then
    end = ScriptedEnd([None, ALLOCATE, PLAN, PLAN, None, None, PLAN, None, Close()])
    monkeypatch.setattr(worker, "return_memory", lambda: returned.append(end.unread))
    worker._serve(FakeRank(samples=True), end, os.getppid())  # type: ignore[arg-type]
    assert returned == [8, 7, 4, 1]


class FakeComm:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_a_ranks_process_joins_its_group_and_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = EngineConfig(model="m", tp=2, kvp=3)
    end, comm, calls = ScriptedEnd([None, Close()]), FakeComm(), list[tuple[object, ...]]()

    def connect(
        rank: int, ranks: int, rendezvous: Path, *, device: str, kvp: int, deterministic: bool
    ) -> FakeComm:
        calls.append((rank, ranks, rendezvous, device, kvp, deterministic))
        return comm

    def make_rank(*arguments: object) -> FakeRank:
        calls.append(arguments)
        return FakeRank(samples=True)

    monkeypatch.setattr(worker, "RankEnd", {"ipc://one": end}.__getitem__)
    monkeypatch.setattr(worker, "choose_device", lambda c, rank: f"{rank} of {c.tp}")
    monkeypatch.setattr(worker, "keep_compiled_loops", lambda environ: calls.append((environ,)))
    monkeypatch.setattr(Communicator, "connect", connect)
    monkeypatch.setattr(worker, "Rank", make_rank)
    worker.worker_main(config, 1, "ipc://one", tmp_path)
    joined = (1, 6, tmp_path, "1 of 2", 3, False)
    assert calls == [(os.environ,), joined, (config, 1, comm)]
    assert end.sent == [DESCRIPTION] and end.unread == 0
    assert end.closed and comm.closed


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (ConfigError("tp", "must be 1"), Failed("ConfigError", "must be 1", "tp")),
        (IndexError("seven"), Failed("IndexError", "seven")),
    ],
)
def test_a_rank_that_fails_says_why(
    error: Exception, failed: Failed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    end = ScriptedEnd([])

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(worker, "RankEnd", lambda endpoint: end)
    monkeypatch.setattr(worker, "choose_device", fail)
    monkeypatch.setattr(worker, "keep_compiled_loops", lambda environ: None)
    with pytest.raises(type(error)):
        worker.worker_main(EngineConfig(model="m"), 0, "ipc://unused", tmp_path / "ranks")
    assert end.sent == [failed] and end.closed
