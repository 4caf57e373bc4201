"""The engine's thread, run here in the test's own: commands, steps, reports, failure."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kvmesh.workers import engine_thread
from kvmesh.workers.engine import Engine
from kvmesh.workers.engine_thread import EngineNews, EngineThread
from kvmesh.workers.executor import MakeMasks
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import EngineLoads
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.request import EndReason, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageNeed
from tests.workers.memory_executor import expected_output
from tests.workers.test_engine import PAGE, make_engine, request, tokens_of

ENDLESS = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)


class Listener:
    """Keeps what is posted. `then` is called with each output and the thread."""

    def __init__(self, then: Callable[[list[SequenceDelta], EngineLoads | None], None]) -> None:
        self._then = then
        self.engines: list[Engine] = []
        self.outputs: list[tuple[list[SequenceDelta], EngineNews | None]] = []
        self.failures: list[Exception] = []

    def engine_started(self, engine: Engine) -> None:
        self.engines.append(engine)

    def engine_output(self, deltas: list[SequenceDelta], report: EngineNews | None) -> None:
        self.outputs.append((deltas, report))
        self._then(deltas, None if report is None else report[0])

    def engine_failed(self, error: Exception) -> None:
        self.failures.append(error)

    @property
    def deltas(self) -> list[SequenceDelta]:
        return [delta for deltas, _ in self.outputs for delta in deltas]

    @property
    def reports(self) -> list[EngineLoads]:
        return [report[0] for _, report in self.outputs if report is not None]


def run(
    make: Callable[[], Engine],
    *commands: engine_thread.Command,
    then: Callable[[EngineThread, list[SequenceDelta], EngineLoads | None], None],
) -> Listener:
    """Run the thread's function here until `then` has put None among its commands."""
    listener = Listener(lambda deltas, loads: then(thread, deltas, loads))
    thread = EngineThread(make, listener)
    thread._loop = SimpleNamespace(call_soon_threadsafe=lambda callback, *args: callback(*args))  # type: ignore[assignment]
    for command in commands:
        thread.put(command)
    thread._run()
    return listener


def stop_when(
    done: Callable[[list[SequenceDelta], EngineLoads | None], bool],
) -> Callable[[EngineThread, list[SequenceDelta], EngineLoads | None], None]:
    def then(thread: EngineThread, deltas: list[SequenceDelta], loads: EngineLoads | None) -> None:
        if done(deltas, loads):
            thread._commands.put(None)

    return then


idle_again = stop_when(
    lambda deltas, loads: loads is not None and not deltas and loads.steps_total > 0
)


def test_commands_run_in_order_and_everything_that_ends_is_reported() -> None:
    engine, _ = make_engine()
    listener = run(
        lambda: engine,
        lambda e: e.add(request("a", [3, 4], 5)),
        lambda e: e.add(request("b", [5, 6], params=ENDLESS)),
        lambda e: e.abort("b"),
        then=idle_again,
    )
    assert listener.engines == [engine]
    assert not listener.failures
    by_name = {name: [x for x in listener.deltas if x.request_id == name] for name in "ab"}
    assert tokens_of(by_name["a"]) == expected_output([3, 4], 5)
    assert [x.finish_reason for x in by_name["b"]] == [EndReason.ABORT]
    last = listener.reports[-1]
    assert (last.running, last.waiting, last.pool.used) == (0, 0, PageNeed(0, 0))
    assert last.outcomes_total == {"stop": 1, "abort": 1}
    steps = [step for _, news in listener.outputs if news is not None for step in news.steps]
    assert len(steps) == last.steps_total


def test_all_pages_are_audited_when_nothing_is_to_do_but_not_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([0.0, 4.0, 13.9, 14.0, 23.0, 30.0])
    now = [next(times)]
    audits: list[float] = []
    monkeypatch.setattr(engine_thread, "time", SimpleNamespace(monotonic=lambda: now[0]))
    engine, _ = make_engine()
    monkeypatch.setattr(engine, "check_integrity", lambda: audits.append(now[0]))

    def then(thread: EngineThread, deltas: list[SequenceDelta], loads: EngineLoads | None) -> None:
        """A report is made each time that there is nothing to do."""
        if (later := next(times, None)) is not None:
            thread.put(lambda _: now.__setitem__(0, later))
        else:
            thread._commands.put(None)

    run(lambda: engine, then=then)
    assert audits == [4.0, 14.0, 30.0]


def test_a_new_engine_reports_at_once_and_stopping_ends_what_runs() -> None:
    engine, _ = make_engine()

    def then(thread: EngineThread, deltas: list[SequenceDelta], loads: EngineLoads | None) -> None:
        if loads == engine.loads() and not loads.steps_total and not engine.has_work:
            thread.put(lambda e: e.add(request("a", [3, 4], params=ENDLESS)))
        elif deltas:
            thread._commands.put(None)

    listener = run(lambda: engine, then=then)
    assert [x.finish_reason for x in listener.deltas] == [None, EndReason.ABORT]
    assert listener.reports[-1].outcomes_total == {"abort": 1}
    assert not engine.has_work


def test_reports_of_a_busy_engine_are_made_once_in_a_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(engine_thread, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(engine_thread, "LOADS_PERIOD_S", 0.75)
    steps = [0]

    engine, executor = make_engine()
    execute = executor.execute

    def ticking(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        steps[0] += 1
        now[0] += 0.25
        return execute(plan, masks)

    executor.execute = ticking  # type: ignore[method-assign]
    listener = run(
        lambda: engine,
        lambda e: e.add(request("a", [3, 4], params=ENDLESS)),
        then=stop_when(lambda deltas, loads: bool(deltas) and steps[0] == 40),
    )
    busy = [loads.steps_total for loads in listener.reports if loads.running and loads.steps_total]
    assert busy == [*range(4, 41, 4)]


def test_an_engine_that_waits_for_growth_reports_and_continues_when_it_comes() -> None:
    engine, _ = make_engine()
    lease = LeaseTerms("l", 1, 1, 0, 9)
    params = SamplingParams(temperature=0.0, max_tokens=2 * PAGE, ignore_eos=True)
    stalls: list[int] = []

    def then(thread: EngineThread, deltas: list[SequenceDelta], loads: EngineLoads | None) -> None:
        if engine.stalled and loads is not None and not deltas:
            assert not stalls, "it still waits"
            stalls.append(loads.running)
            thread.put(lambda e: e.extend(LeaseTerms("l", 1, 1, 9, 9)))
        elif not engine.has_work and engine.scheduler.preemptions_total == 0 and deltas:
            thread._commands.put(None)

    listener = run(
        lambda: engine, lambda e: e.add(request("a", [3, 4], params=params, lease=lease)), then=then
    )
    assert not listener.failures
    assert stalls == [1], "it is reported once, and does not spin"
    assert tokens_of(listener.deltas) == expected_output([3, 4], 2 * PAGE, ignore_eos=True)


def test_an_engine_that_waits_for_growth_wakes_for_a_deadline() -> None:
    engine, _ = make_engine()
    lease = LeaseTerms("l", 1, 1, 0, 9)
    item = request("a", [3, 4], params=ENDLESS, lease=lease, timeout_s=0.2)
    at_its_end = stop_when(lambda deltas, _: any(x.finish_reason is not None for x in deltas))
    listener = run(lambda: engine, lambda e: e.add(item), then=at_its_end)
    assert listener.deltas[-1].finish_reason is EndReason.DEADLINE


@pytest.mark.parametrize("where", ["make", "step", "command"])
def test_an_error_is_posted_and_ends_the_thread(where: str) -> None:
    error = ValueError(where)
    engine, executor = make_engine()

    def fails(*_: object) -> None:
        raise error

    if where == "step":
        executor.execute = fails  # type: ignore[assignment,method-assign]
    make = fails if where == "make" else lambda: engine
    command = fails if where == "command" else lambda e: e.add(request("a", [3, 4]))
    listener = run(make, command, then=lambda *_: None)  # type: ignore[arg-type]
    assert listener.failures == [error]


def test_a_thread_whose_process_ends_does_not_keep_it() -> None:
    thread = EngineThread(lambda: make_engine()[0], Listener(lambda *_: None))._thread
    assert (thread.name, thread.daemon) == ("kvmesh-engine", True)


def test_an_audit_that_fails_when_idle_is_a_failure() -> None:
    engine, _ = make_engine()
    engine.scheduler.cache.sealed.take(0)
    listener = run(lambda: engine, then=lambda *_: None)
    (failure,) = listener.failures
    assert isinstance(failure, AssertionError)


def test_a_loop_that_has_ended_does_not_break_the_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, _ = make_engine()
    thread = EngineThread(lambda: engine, Listener(lambda *_: None))

    def closed(*_: object) -> None:
        raise RuntimeError("Event loop is closed")

    thread._loop = SimpleNamespace(call_soon_threadsafe=closed)  # type: ignore[assignment]
    thread._commands.put(None)
    thread._run()
    assert "the event loop ended before the engine" in caplog.text
