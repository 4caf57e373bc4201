"""The channel between leader and ranks: answers, failures, and lost ranks."""

from __future__ import annotations

import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import zmq

from kvmesh.workers import channel
from kvmesh.workers.channel import (
    Allocated,
    ChannelExecutor,
    Close,
    Divergences,
    Failed,
    Flush,
    Probe,
    RankEnd,
)
from kvmesh.workers.errors import (
    ConfigError,
    RankRaisedError,
    UnsupportedModelError,
    WorkerDiedError,
)
from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription
from kvmesh.workers.plan import (
    Chunk,
    RowStart,
    SampledToken,
    StepPlan,
    StepResult,
    TableUpdate,
    TokenMasks,
)
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.step_limit import MAX_NEW, MIN_NEW

DESCRIPTION = RankDescription("m", "r", "float32", 50, 100, (1,), 0, 0, 4, 1, 100, 8)
PARAMS = SamplingParams(temperature=0.5, logit_bias={3: 1.5}, stop_token_ids=(4, 5), seed=2**64 - 1)
PLAN = StepPlan(
    1,
    [RowStart(0, PARAMS, 3, b"")],
    [Chunk(0, 0, b"\1\0\0\0", True)],
    TableUpdate([0], [0], [7]),
    TableUpdate([], [], []),
    [7],
    [2],
    [0],
)


def answer_everything(end: RankEnd, rank: int, seen: list[object]) -> None:
    end.send(DESCRIPTION)
    while not isinstance(message := end.receive(60), Close | None):
        seen.append(message)
        if isinstance(message, Allocation):
            end.send(Allocated())
        elif isinstance(message, Probe):
            if rank == 0:
                end.send(Divergences([len(name) / 100 for name in message.kv_formats]))
        elif rank == 0 and not isinstance(message, Flush):
            end.send(StepResult(message.step, [SampledToken(9, -0.5, [(9, -0.5)])], 0.0))


def execute(
    executor: ChannelExecutor, plan: StepPlan, masks: MakeMasks | None = None
) -> StepResult:
    executor.submit(plan)
    return executor.result(masks)


def start_ranks(
    executor: ChannelExecutor, body: Callable[[RankEnd, int], None]
) -> list[threading.Thread]:
    def run(rank: int) -> None:
        end = RankEnd(executor.endpoints[rank])
        body(end, rank)
        end.close()

    threads = [
        threading.Thread(target=run, args=(i,), daemon=True) for i in range(executor.num_ranks)
    ]
    for thread in threads:
        thread.start()
    return threads


def test_every_rank_gets_the_same_plan_and_close_ends_them() -> None:
    executor = ChannelExecutor(3)
    seen: list[list[object]] = [[], [], []]
    threads = start_ranks(executor, lambda end, rank: answer_everything(end, rank, seen[rank]))
    assert executor.describe() == [DESCRIPTION] * 3
    assert executor.divergences(["int4", "int8-x"]) == [0.04, 0.06]
    executor.allocate(Allocation(1, 2, 3, 4))
    result = execute(executor, PLAN)
    assert result.tokens[0].token_id == 9 and result.tokens[0].top == [(9, -0.5)]
    executor.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] == [Probe(["int4", "int8-x"]), Allocation(1, 2, 3, 4), PLAN]
    executor.close()


def test_masks_follow_their_plan_to_the_rank_that_samples() -> None:
    executor = ChannelExecutor(2)
    seen: list[list[object]] = [[], []]
    made: list[TokenMasks] = []
    masks = TokenMasks(2, [0], b"\1\0\0\0")
    masked = msgspec.structs.replace(PLAN, masked=True)

    def body(end: RankEnd, rank: int) -> None:
        end.send(DESCRIPTION)
        while not isinstance(message := end.receive(60), Close | None):
            seen[rank].append(message)
            if isinstance(message, TokenMasks):
                end.send(StepResult(message.step, [], 0.0))

    def make() -> TokenMasks:
        made.append(masks)
        return masks

    threads = start_ranks(executor, body)
    executor.describe()
    assert execute(executor, masked, make).step == 2
    executor.close()
    for thread in threads:
        thread.join(60)
    assert seen == [[masked, masks], [masked]]
    assert made == [masks]


@pytest.mark.parametrize(("device", "flushes"), [("cpu", 0), ("cuda", 1)])
def test_ranks_that_run_ahead_hear_that_no_step_follows(device: str, flushes: int) -> None:
    executor = ChannelExecutor(2)
    ends = [RankEnd(endpoint) for endpoint in executor.endpoints]
    for end in ends:
        end.send(msgspec.structs.replace(DESCRIPTION, device=device))
    executor.describe()
    plans = [msgspec.structs.replace(PLAN, step=step) for step in (1, 2, 3)]
    for plan in plans:
        ends[0].send(StepResult(plan.step, [], 0.0))
    executor.submit(plans[0])
    for plan in plans[1:]:
        executor.submit(plan)
        assert executor.result().step == plan.step - 1
    assert executor.result().step == 3
    executor.close()
    for rank, end in enumerate(ends):
        expected: list[object] = [*plans, *[Flush()] * (0 if rank else flushes), Close()]
        assert [end.receive(60) for _ in expected] == expected
        assert end.receive(0) is None
        end.close()


def test_a_failure_of_any_rank_ends_the_wait_for_other_ranks() -> None:
    executor = ChannelExecutor(2)

    def body(end: RankEnd, rank: int) -> None:
        end.send(DESCRIPTION)
        end.receive(60)
        if rank == 1:
            end.send(Failed("OutOfMemoryError", "no room"))

    threads = start_ranks(executor, body)
    executor.describe()
    with pytest.raises(WorkerDiedError, match="OutOfMemoryError: no room"):
        execute(executor, PLAN)
    executor.close()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("kind", [ConfigError, UnsupportedModelError])
def test_configuration_errors_of_a_rank_keep_class_and_field(kind: type[ConfigError]) -> None:
    executor = ChannelExecutor(1)
    threads = start_ranks(
        executor, lambda end, rank: end.send(Failed(kind.__name__, "must divide 3", "tp"))
    )
    with pytest.raises(kind) as caught:
        executor.describe()
    assert (type(caught.value), caught.value.field) == (kind, "tp")
    executor.close()
    threads[0].join(60)


def test_only_the_first_lost_rank_is_reported() -> None:
    executor = ChannelExecutor(2)
    executor.fail(WorkerDiedError("rank 0 was killed"))
    executor.fail(WorkerDiedError("rank 1 was killed"))
    with pytest.raises(WorkerDiedError, match="rank 0 was killed"):
        executor.describe()
    executor.close()


def wait_for_message(executor: ChannelExecutor, rank: int) -> None:
    assert executor._sockets[rank].poll(60_000)


def test_a_lost_rank_is_reported_with_its_own_last_message() -> None:
    """It is unread when another thread notices that the process has ended."""
    executor = ChannelExecutor(2)
    end = RankEnd(executor.endpoints[1])
    end.send(Failed("OutOfMemoryError", "no room"))
    wait_for_message(executor, 1)
    executor.fail(WorkerDiedError("rank 1 was killed"))
    with pytest.raises(WorkerDiedError, match="OutOfMemoryError: no room"):
        executor.describe()
    executor.close()
    end.close()


class ArrivedMessages:
    """A socket, whose messages have all arrived. polls: for how long each poll may wait"""

    def __init__(self, *messages: Failed | RankDescription) -> None:
        self._messages = [msgspec.msgpack.encode(message) for message in messages]
        self.polls: list[int] = []

    def poll(self, timeout_ms: int) -> bool:
        self.polls.append(timeout_ms)
        return bool(self._messages)

    def recv(self) -> bytes:
        return self._messages.pop(0)


def test_a_reason_is_found_after_other_messages_of_a_lost_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = ChannelExecutor(2)
    with monkeypatch.context() as patch:
        arrived = ArrivedMessages(DESCRIPTION, Failed("OutOfMemoryError", "no room"))
        patch.setattr(executor, "_sockets", [ArrivedMessages(), arrived])
        executor.fail(WorkerDiedError("rank 1 was killed"))
        with pytest.raises(RankRaisedError, match="OutOfMemoryError: no room"):
            executor.describe()
    executor.close()


def test_a_limit_is_waited_for_in_polls_of_the_rank_that_has_to_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = ChannelExecutor(2, start_timeout_s=0.24)
    answers, hangs = ArrivedMessages(DESCRIPTION), ArrivedMessages()
    with monkeypatch.context() as patch:
        patch.setattr(executor, "_sockets", [answers, hangs])
        with pytest.raises(WorkerDiedError, match=r"rank 1 hangs.* within 0\.24 s"):
            executor.describe()
    read_all, no_wait, wait = 0, 0, 50
    assert hangs.polls == [no_wait, *[wait] * 5]
    assert answers.polls == [wait, read_all, *[no_wait] * 5]
    executor.close()


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_failures_the_cause_is_reported(first: int) -> None:
    """A rank that has lost another one fails too, and may be heard of first."""
    executor = ChannelExecutor(2)
    ends = [RankEnd(endpoint) for endpoint in executor.endpoints]
    ends[first].send(Failed("WorkerDiedError", "rank 9 has ended"))
    ends[1 - first].send(Failed("OutOfMemoryError", "no room"))
    for rank in range(2):
        wait_for_message(executor, rank)
    with pytest.raises(RankRaisedError, match="no room"):
        executor.describe()
    executor.close()
    for end in ends:
        end.close()


def test_without_a_cause_the_first_failure_is_reported() -> None:
    executor = ChannelExecutor(2)
    ends = [RankEnd(endpoint) for endpoint in executor.endpoints]
    for rank, end in enumerate(ends):
        end.send(Failed("WorkerDiedError", f"rank {1 - rank} has ended"))
        wait_for_message(executor, rank)
    with pytest.raises(WorkerDiedError, match="rank 1 has ended"):
        executor.describe()
    executor.close()
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    ("failed", "error"),
    [
        (Failed("ConfigError", "must be 1", "tp"), ConfigError("tp", "must be 1")),
        (
            Failed("UnsupportedModelError", "is new", "model"),
            UnsupportedModelError("model", "is new"),
        ),
        (
            Failed("WorkerDiedError", "rank 1 has ended"),
            WorkerDiedError("WorkerDiedError: rank 1 has ended"),
        ),
        (Failed("IndexError", "7"), RankRaisedError("IndexError: 7")),
    ],
)
def test_what_a_failed_rank_raises(failed: Failed, error: Exception) -> None:
    raised = failed.error()
    assert (type(raised), raised.args) == (type(error), error.args)


def test_descriptions_are_sent_once_and_remembered() -> None:
    executor = ChannelExecutor(1, start_timeout_s=0.05)
    end = RankEnd(executor.endpoints[0])
    end.send(DESCRIPTION)
    wait_for_message(executor, 0)
    assert executor.describe() == executor.describe() == [DESCRIPTION]
    executor.close()
    end.close()


def test_answers_are_taken_in_the_order_in_which_they_were_sent() -> None:
    executor = ChannelExecutor(1)
    end = RankEnd(executor.endpoints[0])
    for message in (DESCRIPTION, Divergences([0.5]), Allocated(), StepResult(1, [], 0.5)):
        end.send(message)
    assert executor.describe() == [DESCRIPTION]
    assert executor.divergences(["int4"]) == [0.5]
    executor.allocate(Allocation(1, 2, 3, 4))
    assert execute(executor, PLAN).host_s == 0.5
    executor.close()
    end.close()


def test_every_rank_must_have_allocated() -> None:
    executor = ChannelExecutor(2, start_timeout_s=0.1)
    ends = [RankEnd(endpoint) for endpoint in executor.endpoints]
    ends[0].send(Allocated())
    wait_for_message(executor, 0)
    with pytest.raises(WorkerDiedError, match="rank 1 hangs"):
        executor.allocate(Allocation(1, 2, 3, 4))
    assert [end.receive(60) for end in ends] == [Allocation(1, 2, 3, 4)] * 2
    executor.close()
    assert [end.receive(60) for end in ends] == [Close()] * 2
    for end in ends:
        assert end.receive(0) is None
        end.close()


def test_an_answer_of_another_kind_is_a_failure() -> None:
    executor = ChannelExecutor(1)
    end = RankEnd(executor.endpoints[0])
    end.send(Allocated())
    with pytest.raises(WorkerDiedError, match="must answer with RankDescription, got Allocated"):
        executor.describe()
    executor.close()
    end.close()


def test_a_rank_that_is_lost_before_it_connects_ends_the_wait_to_send() -> None:
    executor = ChannelExecutor(1)
    executor.fail(WorkerDiedError("rank 0 was killed"))
    with pytest.raises(WorkerDiedError, match="rank 0 was killed"):
        executor.allocate(Allocation(1, 2, 3, 4))
    executor.close()
    executor.fail(WorkerDiedError("it has ended, as it should"))
    assert str(executor._failure) == "rank 0 was killed"


def test_an_executor_that_is_closed_expects_its_ranks_to_end() -> None:
    executor = ChannelExecutor(1)
    executor.close()
    executor.fail(WorkerDiedError("it has ended, as it should"))
    assert executor._failure is None


def test_limits_are_learned_from_steps() -> None:
    executor = ChannelExecutor(1, step_timeout_s=1000.0)
    threads = start_ranks(executor, lambda end, rank: answer_everything(end, rank, []))
    executor.describe()
    limits_s = []
    for _ in range(3):
        limits_s.append(executor._step_limit.of(PLAN))
        execute(executor, PLAN)
    assert limits_s == [MAX_NEW * 1000.0, MIN_NEW * 1000.0, 1000.0]
    executor.close()
    threads[0].join(60)


def test_a_step_is_learned_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = ChannelExecutor(1)
    threads = start_ranks(executor, lambda end, rank: answer_everything(end, rank, []))
    executor.describe()
    learned_s: list[float] = []
    monkeypatch.setattr(executor._step_limit, "learn", lambda plan, s: learned_s.append(s))
    started_s = time.monotonic()
    execute(executor, PLAN)
    assert 0.0 <= learned_s[0] <= time.monotonic() - started_s
    executor.close()
    threads[0].join(60)


def test_a_step_in_flight_is_learned_from_the_result_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = ChannelExecutor(1)
    threads = start_ranks(executor, lambda end, rank: answer_everything(end, rank, []))
    executor.describe()
    learned_s: list[float] = []
    monkeypatch.setattr(executor._step_limit, "learn", lambda plan, s: learned_s.append(s))
    times = iter((0.25, 0.75, 5.25, 8.25))
    monkeypatch.setattr(channel, "time", SimpleNamespace(monotonic=lambda: next(times)))
    executor.submit(PLAN)
    executor.submit(PLAN)
    executor.result()
    executor.result()
    assert learned_s == [5.0, 3.0]
    executor.close()
    threads[0].join(60)


def test_the_sockets_are_in_a_private_directory_that_close_removes() -> None:
    executor = ChannelExecutor(1)
    directory = Path(executor.endpoints[0].removeprefix("ipc://")).parent
    assert directory.name.startswith("kvmesh-")
    assert executor.rendezvous.parent == directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    executor.close()
    assert not directory.exists()


class ClosedSocket:
    """Keeps what was done with it. full: nobody reads what is sent"""

    def __init__(self, full: bool) -> None:
        self._full = full
        self.done: list[object] = []

    def send(self, data: bytes, flags: int) -> None:
        if self._full:
            raise zmq.Again
        self.done += [msgspec.msgpack.decode(data, type=Close), flags]

    def close(self, linger: int) -> None:
        self.done.append(linger)


def test_the_last_messages_have_a_second_to_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = ChannelExecutor(1)
    end = RankEnd(executor.endpoints[0])
    assert end._socket.getsockopt(zmq.LINGER) == 1000
    end.close()
    (socket,) = executor._sockets
    assert socket.getsockopt(zmq.LINGER) == 0, "a leader that has not closed it waits for nobody"
    socket.close()
    sockets = [ClosedSocket(full=True), ClosedSocket(full=False)]
    monkeypatch.setattr(executor, "_sockets", sockets)
    executor.close()
    assert [x.done for x in sockets] == [[1000], [Close(), zmq.DONTWAIT, 1000]]


def test_an_executor_whose_directory_is_gone_can_be_closed() -> None:
    executor = ChannelExecutor(1)
    shutil.rmtree(executor.rendezvous.parent)
    executor.close()


def test_a_rank_that_hangs_in_a_step_fails_it() -> None:
    executor = ChannelExecutor(2, step_timeout_s=0.01)
    ends = [RankEnd(endpoint) for endpoint in executor.endpoints]
    for end in ends:
        end.send(DESCRIPTION)
    executor.describe()
    ends[0].send(StepResult(PLAN.step, [], 0.0))
    wait_for_message(executor, 0)
    execute(executor, PLAN)
    with pytest.raises(WorkerDiedError, match=r"no answer to a step of 1 tokens.*step_timeout_s"):
        execute(executor, PLAN)
    executor.close()
    for end in ends:
        end.close()


def test_a_rank_that_hangs_while_it_loads_fails_the_start() -> None:
    executor = ChannelExecutor(2, start_timeout_s=0.1)
    end = RankEnd(executor.endpoints[0])
    end.send(DESCRIPTION)
    wait_for_message(executor, 0)
    with pytest.raises(WorkerDiedError, match=r"rank 1 hangs.*timeouts\.start_s"):
        executor.describe()
    executor.close()
    end.close()


def test_an_answer_that_has_arrived_counts_however_late_it_is_read() -> None:
    """As after the whole machine was suspended: limits are counted in polls."""
    executor = ChannelExecutor(1, step_timeout_s=1e-9)
    end = RankEnd(executor.endpoints[0])
    for _ in range(20):
        end.send(StepResult(PLAN.step, [], 0.0))
        wait_for_message(executor, 0)
        assert execute(executor, PLAN).step == PLAN.step
    executor.close()
    end.close()
