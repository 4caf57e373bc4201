"""Two steps in flight: the same output as with one, and what is lost when they fail."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.errors import WorkerDiedError
from kvmesh.workers.executor import MakeMasks
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.plan import PENDING, StepPlan, StepResult
from kvmesh.workers.request import EndReason, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.structured.grammar import regex
from tests.workers.memory_executor import MemoryExecutor, expected_output
from tests.workers.structured import tiny
from tests.workers.test_engine import PAGE, make_engine, request, run, tokens_of
from tests.workers.test_leader import CONFIG, ENDLESS, Inbox

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 3},
    {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 1.2, "top_k": 20, "min_tokens": 9, "stop_token_ids": tuple(range(40, 90))},
    {"temperature": 0.0, "prompt_logprobs": 2},
)


def test_a_model_outputs_the_same_with_one_step_in_flight_and_with_two() -> None:
    """Sampling, penalties, log-probabilities, grammars and a preemption, token for token."""

    def outputs(in_flight: int) -> tuple[dict[str, list[SequenceDelta]], int]:
        engine = tiny.engine(in_flight)
        for number, kind in enumerate(KINDS):
            params = {"max_tokens": 24, **kind}
            engine.add(tiny.request(str(number), None, **params))
        bound = OutputConstraint(regex("[a-c ]{9}[d-f ]{9}").text())
        engine.add(tiny.request("bound", bound))
        found: dict[str, list[SequenceDelta]] = {}
        overlapping = steps = 0
        while engine.has_work or engine.awaits_result:
            if steps == 12:
                engine.scheduler.preempt_youngest()
                engine.scheduler.preempt_youngest()
            for delta in engine.step():
                found.setdefault(delta.request_id, []).append(delta)
            steps += 1
            overlapping += engine.awaits_result
        engine.check_integrity()
        return found, overlapping

    one, without = outputs(1)
    two, overlapping = outputs(2)
    assert without == 0 and overlapping > 20
    assert one.keys() == two.keys()
    for name, alone in one.items():
        assert tokens_of(two[name]) == tokens_of(alone)
        assert two[name][-1].finish_reason is alone[-1].finish_reason
        found = [[x for d in deltas for x in d.logprobs] for deltas in (alone, two[name])]
        assert found[0] == pytest.approx(found[1]) if not found[0] else True
        for a, b in zip(*found, strict=True):
            assert b.logprob == pytest.approx(a.logprob, abs=1e-4)
            assert [i for i, _ in b.top] == [i for i, _ in a.top]


def test_a_step_names_tokens_that_are_not_known_yet() -> None:
    engine, executor = make_engine(in_flight=2)
    engine.add(request("r", [3, 4, 5], 4))
    assert tokens_of(run(engine)["r"]) == expected_output([3, 4, 5], 4)
    assert [chunk.tokens == PENDING for plan in executor.plans for chunk in plan.chunks] == [
        False,
        *[True] * 3,
    ]


def test_what_is_computed_beyond_the_end_is_neither_streamed_nor_counted() -> None:
    """Nor leased: the last token that may be written is within the lease."""
    prompt = list(range(2, PAGE))
    whole = expected_output(prompt, 8, ignore_eos=True)
    ends: list[SequenceDelta] = []
    for in_flight in (1, 2):
        engine, executor = make_engine(in_flight=in_flight)
        params = SamplingParams(temperature=0.0, max_tokens=50, stop_token_ids=(whole[2],))
        engine.add(request("r", prompt, params=params))
        deltas = run(engine)["r"]
        assert tokens_of(deltas) == whole[:3]
        while engine.awaits_result:
            assert engine.step() == []
        assert len(executor.plans) == 2 + in_flight
        engine.check_integrity()
        assert engine.loads().completion_tokens_total == 3
        ends.append(deltas[-1])
    times = {"queue_s": 0, "total_s": 0, "time_to_first_token_s": 0}
    usages = [end.usage for end in ends if end.usage is not None]
    one, two = (msgspec.structs.replace(usage, **times) for usage in usages)
    assert one == two


def test_a_token_that_ends_by_its_number_is_not_computed() -> None:
    engine, executor = make_engine(in_flight=2)
    engine.add(request("r", [3, 4], params=replace(ENDLESS, max_tokens=3)))
    run(engine)
    assert len(executor.plans) == 3 and not engine.awaits_result


def test_a_page_that_an_unknown_token_fills_is_not_shared_but_found_later() -> None:
    """Two sequences that differ only in that token decode at once."""
    engine, executor = make_engine(in_flight=2)
    prompt = [int(i) % 40 for i in range(PAGE - 1)]
    outputs = {}
    for top_k in (0, 5):
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, top_k=top_k)
        engine.add(request(str(top_k), prompt, params=params))
        outputs[str(top_k)] = expected_output(prompt, 6, True, top_k=top_k)
    assert outputs["0"][0] != outputs["5"][0]
    deltas = run(engine)
    assert {name: tokens_of(found) for name, found in deltas.items()} == outputs
    assert executor.sealed_pages == 2
    for name, output in outputs.items():
        engine.add(request(f"again {name}", [*prompt, *output], 1))
        usage = run(engine)[f"again {name}"][-1].usage
        assert usage is not None and usage.cached_tokens == PAGE


class FailingExecutor(MemoryExecutor):
    """Fails instead of computing step `fails`, once it has two steps."""

    max_in_flight = 2
    fails = 9

    def __init__(self) -> None:
        super().__init__(PAGE, 0, 0, 400)
        self.go = threading.Event()

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        assert self.go.wait(60)
        if plan.step == self.fails:
            assert len(self._submitted) == 1, "another step is in flight"
            raise WorkerDiedError("rank 0 ended")
        return super().execute(plan, masks)


async def test_sequences_of_two_failed_steps_resume_and_no_token_is_lost_or_doubled() -> None:
    executor = FailingExecutor()
    leader = EngineLeader(CONFIG, executor)
    await leader.start()
    inbox = Inbox()
    names = ["a", "b", "c", "d", "waits"]  # four rows
    for index, name in enumerate(names):
        leader.submit([request(name, [3 + index], params=ENDLESS)], inbox.deliver)
    executor.go.set()
    read = await inbox.until_end(set(names))
    for name in names[:4]:
        assert read[name][-1].finish_reason is EndReason.ERROR
    assert read["waits"][-1].finish_reason is EndReason.CLEARED
    assert leader.failed is not None
    for index, name in enumerate(names):
        output = tokens_of(read[name])
        whole = expected_output([3 + index], 40, ignore_eos=True)
        assert output == whole[: len(output)]
        # It continues elsewhere with what it has.
        engine, _ = make_engine(in_flight=2)
        prompt = [3 + index, *output]
        params = replace(ENDLESS, max_tokens=40)
        engine.add(request(name, prompt, params=params, resumed_tokens=len(output)))
        assert output + tokens_of(run(engine)[name]) == whole
    await leader.stop()
