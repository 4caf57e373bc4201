"""Chunks of prompts that leave room for those that decode, with a clock that steps advance."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.executor import MakeMasks
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.step_budget import MIN_STRETCH, UNLIMITED, StepBudget, StepWork
from tests.exercised import Exercised
from tests.workers.memory_executor import MemoryExecutor, expected_output

COSTS = (0.002, 1e-4, 1e-8, 1e-7)  # seconds: a step, a prompt token, a pair, a token of context


def seconds(work: StepWork, costs: tuple[float, ...] = COSTS) -> float:
    return float(work.vector() @ np.array(costs))


def work_of(*chunks: tuple[int, int]) -> StepWork:
    """chunks: (start, tokens)"""
    work = StepWork()
    for start, count in chunks:
        work.add(start, start + count)
    return work


DECODING = [(1000, 1), (3000, 1)]
SEEN = [
    [(0, 2048)],
    [(2048, 2048)],
    DECODING,
    [*DECODING, (0, 2000)],
    [(4000, 1), (500, 1), (9000, 300)],
    [(700, 1)],
]


def learned(costs: tuple[float, ...] = COSTS, max_step_s: float = 0.05) -> StepBudget:
    budget = StepBudget(max_step_s)
    for chunks in SEEN:
        budget.learn(work_of(*chunks), seconds(work_of(*chunks), costs))
    return budget


FILLED = Exercised("step budget", {"chunks that fill the step": 30, "no room for more": 2})


@FILLED.required
@given(
    costs=st.tuples(
        st.floats(1e-4, 1e-2), st.floats(1e-6, 1e-3), st.floats(0, 1e-7), st.floats(0, 1e-6)
    ),
    start=st.integers(0, 1 << 20),
    max_step_s=st.floats(0.001, 1.0),
)
def test_the_largest_chunk_fills_the_step_and_no_more(
    costs: tuple[float, ...], start: int, max_step_s: float
) -> None:
    count = learned(costs, max_step_s).chunk_tokens(work_of(*DECODING), start)
    limit_s = max(max_step_s, MIN_STRETCH * seconds(work_of(*DECODING), costs))
    assert count >= 1
    FILLED.add("chunks that fill the step" if count > 1 else "no room for more")
    if count > 1:
        assert seconds(work_of(*DECODING, (start, count)), costs) <= 1.01 * limit_s
    assert seconds(work_of(*DECODING, (start, count + 2)), costs) >= 0.99 * limit_s


def test_nothing_fits_a_step_that_is_full_already() -> None:
    assert learned().chunk_tokens(work_of(*DECODING, (0, 2048)), 0) == 0


def test_prompts_have_the_whole_step_while_nothing_decodes_or_is_known() -> None:
    assert learned().chunk_tokens(work_of((0, 2048)), 0) == UNLIMITED
    assert StepBudget(0.05).chunk_tokens(work_of(*DECODING), 0) == UNLIMITED


def test_a_step_that_compiled_is_hardly_believed() -> None:
    usual = learned().chunk_tokens(work_of(*DECODING), 0)
    budget = StepBudget(0.05)
    budget.learn(work_of(*DECODING, (0, 2048)), 30.0)
    for chunks in SEEN:
        budget.learn(work_of(*chunks), seconds(work_of(*chunks)))
    assert budget.chunk_tokens(work_of(*DECODING), 0) == pytest.approx(usual, rel=0.02)


@dataclass
class TimedExecutor(MemoryExecutor):
    """Advances the clock by what a step would take; keeps (decoding, seconds) of each."""

    now: float = 0.0
    steps: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(16, 0, 0, 400)

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        work = work_of(*((chunk.start, chunk.num_tokens) for chunk in plan.chunks))
        taken = seconds(work)
        self.now += taken
        self.steps.append((work.decoding, taken))
        return super().execute(plan, masks)


def serve(max_step_s: float | None) -> tuple[TimedExecutor, dict[str, list[int]]]:
    """One sequence decodes while three long prompts arrive."""
    executor = TimedExecutor()
    config = EngineConfig(
        model="memory",
        page_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        max_step_s=max_step_s,
    )
    engine = Engine(config, executor, lambda: executor.now)
    outputs: dict[str, list[int]] = {}

    def step() -> None:
        for delta in engine.step():
            outputs.setdefault(delta.request_id, []).extend(delta.token_ids)

    def add(name: str, prompt: list[int], max_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        engine.add(EngineRequest(name, np.array(prompt, np.int32), params))

    add("first", [3] * 60, 200)
    for _ in range(5):
        step()
    for number in range(3):
        add(f"long{number}", [4 + number] * 600, 3)
    while engine.has_work:
        step()
        engine.check_integrity()
    return executor, outputs


def test_steps_stay_within_their_time_while_a_sequence_decodes() -> None:
    executor, outputs = serve(max_step_s=0.01)
    assert max(taken for decoding, taken in executor.steps if decoding) <= 0.01
    unlimited, same_outputs = serve(max_step_s=None)
    assert max(taken for decoding, taken in unlimited.steps if decoding) > 0.025
    assert outputs == same_outputs
    assert outputs["long0"] == expected_output([4] * 600, 3, ignore_eos=True)


@pytest.mark.parametrize("costs", [(0.002, 1e-4, 0.0, 1e-7), (0.002, 0.0, 1e-7, 1e-7)])
def test_prompts_are_limited_by_whichever_cost_is_known(costs: tuple[float, ...]) -> None:
    """Of long contexts the pairs may explain all of a step's time."""
    budget = StepBudget(0.05)
    budget._coefficients = np.array(costs)
    count = budget.chunk_tokens(work_of(*DECODING), 5000)
    assert 0 < count < UNLIMITED
    assert seconds(work_of(*DECODING, (5000, count)), costs) <= 0.05 * (1 + 1e-9)
    budget._coefficients = np.array((0.002, 0.0, 0.0, 1e-7))
    assert budget.chunk_tokens(work_of(*DECODING), 5000) == UNLIMITED
