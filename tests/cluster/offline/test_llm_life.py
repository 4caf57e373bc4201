"""The life of an LLM: closing it, losing its engine, threads, processes, interruptions."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from kvmesh import LLM, ClosedError, ServerError, UsageError
from kvmesh.cluster.engine_service import EngineService
from kvmesh.cluster.offline import llm as llm_module
from kvmesh.cluster.offline import local_cluster as local_cluster_module
from kvmesh.cluster.offline.local_cluster import EngineFailedError, LocalCluster
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.local import InProcessExecutor
from kvmesh.workers.plan import StepPlan
from kvmesh.workers.rank import Rank
from tests.cluster.offline.test_llm import idle
from tests.cluster.offline.tiny_llm import ENGINE, GREEDY, tiny_llm
from tests.repo.imports import ROOT
from tests.workers.structured.tiny import model_path

DOCUMENT = (ROOT / "docs/offline.md").read_text("utf-8")
LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """An LLM that closes collects garbage, and is not to walk what earlier tests have left."""
    gc.collect()
    gc.freeze()


def test_a_closed_llm_says_so() -> None:
    made = tiny_llm()
    client, stream = made.client, made.stream("x", **LONG)
    next(stream)
    made.close()
    made.close()
    for call in (
        lambda: made.generate("x"),
        lambda: made.generate(["x"]),
        lambda: list(made.iterate(["x"])),
        lambda: list(made.stream("x")),
        lambda: made.score("x"),
        lambda: client.model_info(),
        lambda: list(stream),
    ):
        with pytest.raises(ClosedError, match="the LLM has been closed"):
            call()
    with pytest.raises(ClosedError), made as again:
        again.generate("x")


def test_closing_ends_what_other_threads_wait_for() -> None:
    made = tiny_llm()
    errors: list[Exception] = []
    streaming = made.stream("x", **LONG)

    def generate() -> None:
        try:
            made.generate(["x"] * 20, **LONG)
        except ClosedError as error:
            errors.append(error)

    next(streaming)
    thread = threading.Thread(target=generate)
    thread.start()
    while len(made.client.loads().groups[0].oldest) < 4:
        pass
    made.close()
    thread.join()
    assert len(errors) == 1
    with pytest.raises(ClosedError):
        list(streaming)


def test_an_interrupted_batch_ends_and_the_next_one_runs(llm: LLM) -> None:
    def prompts() -> Iterator[str]:
        yield from ["x"] * 6
        raise KeyboardInterrupt  # as a signal does in the thread that waits

    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts(), **LONG)
    assert idle(llm)
    assert llm.generate("x", max_tokens=3, **GREEDY).usage.completion_tokens == 3


def test_leaving_a_stream_ends_it(llm: LLM) -> None:
    with llm.stream("x", **LONG) as stream:
        next(stream)
    assert idle(llm)
    with pytest.raises(ClosedError, match="the stream has been closed"):
        next(stream)


def test_threads_and_a_running_loop_share_one(llm: LLM) -> None:
    expected = llm.generate("x", max_tokens=5, **GREEDY).choices

    async def ask() -> Any:
        def generate() -> Any:
            return llm.generate("x", max_tokens=5, **GREEDY)

        others = [asyncio.to_thread(generate) for _ in range(5)]
        return [generate(), *await asyncio.gather(*others)]

    assert all(found.choices == expected for found in asyncio.run(ask()))


def test_two_live_next_to_each_other(llm: LLM) -> None:
    with tiny_llm() as other:
        assert other.generate("x", max_tokens=4, **GREEDY).choices == (
            llm.generate("x", max_tokens=4, **GREEDY).choices
        )
    assert llm.generate("x", max_tokens=1)


def test_one_that_is_dropped_is_closed_once_nothing_uses_it() -> None:
    made = tiny_llm()
    thread = made._loop._thread
    stream = made.stream("x", max_tokens=5, **GREEDY)
    del made
    gc.collect()
    assert len(list(stream)) > 1
    del stream
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_forked_process_cannot_use_it(llm: LLM) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            llm.generate("x")
        except UsageError as error:
            os.write(writer, str(error).encode())
        finally:
            llm.close()  # does nothing
            os._exit(0)
    os.waitpid(child, 0)
    assert b"was made before process" in os.read(reader, 1000)
    assert llm.generate("x", max_tokens=1)
    with pytest.raises(TypeError, match="make one in each process"):
        pickle.dumps(llm)


# An engine that fails


class FailingExecutor(InProcessExecutor):
    """Raises at the steps whose numbers, over all engines, are in `failing`."""

    steps = 0
    failing: frozenset[int] | range = frozenset()
    made: ClassVar[list[weakref.ref[Rank]]] = []

    def __init__(self, config: EngineConfig) -> None:
        assert not any(former() for former in self.made), "two would need twice the memory"
        super().__init__(config)
        self.made.append(weakref.ref(self.rank))

    def submit(self, plan: StepPlan) -> None:
        FailingExecutor.steps += 1
        if self.steps in self.failing:
            raise RuntimeError("a fault of the device")
        super().submit(plan)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[FailingExecutor]:
    def make(config: Any) -> LocalCluster:
        return LocalCluster(config, make_executor=FailingExecutor)

    monkeypatch.setattr(llm_module, "LocalCluster", make)
    monkeypatch.setattr(FailingExecutor, "steps", 0)
    monkeypatch.setattr(FailingExecutor, "made", [])
    return FailingExecutor


def test_output_continues_on_a_new_engine(
    llm: LLM, failing: type[FailingExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failing, "failing", frozenset({7}))
    expected = llm.generate(["a", "b"], max_tokens=12, **GREEDY)
    with tiny_llm() as made:
        found = made.generate(["a", "b"], max_tokens=12, **GREEDY)
    assert [x.choices for x in found] == [x.choices for x in expected]
    assert max(x.usage.failovers for x in found) == 1
    assert len(failing.made) == 2


def test_engines_that_fail_in_vain_are_given_up(
    failing: type[FailingExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failing, "failing", range(1, 1000))
    monkeypatch.setattr(local_cluster_module, "GUARD_PERIOD_S", 0.01)
    with tiny_llm() as made:
        errors = made.generate(["x"] * 20, max_tokens=3, on_error="return")
        assert all(isinstance(error, ServerError) for error in errors)
        assert "the engine has failed: 4 engines in a row have failed: a fault of the device" in (
            str(errors[-1])
        )
        with pytest.raises(ServerError, match="4 engines in a row"):
            made.generate("x")


def test_engines_that_fail_in_vain_are_given_up_whatever_was_answered_before(
    failing: type[FailingExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_cluster_module, "GUARD_PERIOD_S", 0.01)
    with tiny_llm() as made:
        made.generate("x", max_tokens=3)
        monkeypatch.setattr(failing, "failing", range(1, 1000))
        errors = made.generate(["x"] * 20, max_tokens=3, on_error="return", timeout_s=120.0)
        assert "4 engines in a row have failed" in str(errors[-1])


@pytest.mark.parametrize("failures", [1, 1000])
def test_engines_that_fail_before_they_are_known_are_replaced_or_given_up(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, start = iter(range(failures)), EngineService.start

    async def start_and_fail(service: EngineService) -> EngineInfo:
        info = await start(service)
        if next(left, None) is not None:
            service.leader.engine_failed(RuntimeError("a fault of the device"))
        return info

    monkeypatch.setattr(EngineService, "start", start_and_fail)
    monkeypatch.setattr(local_cluster_module, "GUARD_PERIOD_S", 0.01)
    if failures > 1:
        with pytest.raises(EngineFailedError, match="4 engines in a row have failed: a fault of"):
            tiny_llm()
    else:
        with tiny_llm() as made:
            assert made.generate("x", max_tokens=1)


def test_an_engine_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(config: EngineConfig) -> Any:
        raise RuntimeError("no such device")

    def cluster(config: Any) -> LocalCluster:
        return LocalCluster(config, make_executor=make)

    monkeypatch.setattr(llm_module, "LocalCluster", cluster)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no such device"):
        tiny_llm()
    while threading.active_count() > before:
        gc.collect()


def test_a_model_is_pinned_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer and its weights are of one commit."""
    read: list[str] = []

    def resolve(model: str, **_: Any) -> None:
        read.append(model)
        raise ConfigError("model", "stop here")

    monkeypatch.setattr(local_cluster_module, "pinned", lambda model: f"{model}@commit")
    monkeypatch.setattr(local_cluster_module, "resolve_model", resolve)
    with pytest.raises(ConfigError, match="stop here"):
        LLM("owner/name")
    assert read == ["owner/name@commit"]


# Other processes


def run_program(program: str) -> str:
    """Its output. From stdin, so that there is no file that a child could run again."""
    model = f"model, engine = {str(model_path())!r}, {ENGINE!r}\n"
    found = subprocess.run(
        [sys.executable, "-"],
        input="from kvmesh import LLM\n" + model + program,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_several_ranks_give_what_one_does(llm: LLM) -> None:
    (ids,) = run_program(
        "with LLM(model, tp=2, **engine) as llm:\n"
        "    print(llm.generate('x y', max_tokens=8, temperature=0).choices[0].token_ids)\n"
    ).splitlines()
    assert ids == str(llm.generate("x y", max_tokens=8, temperature=0).choices[0].token_ids)


@pytest.mark.slow
def test_a_program_ends_without_closing_one_that_computes() -> None:
    said = run_program(
        "stream = LLM(model, **engine).stream('x', max_tokens=900, ignore_eos=True)\n"
        "next(stream)\nprint('the end')\n"
    )
    assert said == "the end\n"


def test_the_page_about_it_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(llm_module, "LLM", lambda model, kv_format: tiny_llm())
    exec(compile(block, "docs/offline.md", "exec"), {"__name__": "__main__"})
    assert float(capsys.readouterr().out.rsplit("\n", 2)[-2]) < 0
