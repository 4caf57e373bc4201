"""Limits of steps: learned from their times, generous to slow and to new ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.workers.plan import Chunk, StepPlan, TableUpdate
from kvmesh.workers.step_limit import MAX_NEW, MIN_NEW, SLACK, StepLimit

NO_PAGES = TableUpdate([], [], [])
FLOOR_S = 10.0


def plan(*chunks: tuple[int, int], seal: bool = False) -> StepPlan:
    """chunks: (start, tokens)"""
    found = [Chunk(i, start, b"\0" * 4 * n, True) for i, (start, n) in enumerate(chunks)]
    sealed = [0] if seal else []
    return StepPlan(1, [], found, NO_PAGES, NO_PAGES, sealed, sealed, sealed)


DECODE = plan((100, 1))
PREFILL = plan((0, 512))


def learned(*steps: tuple[StepPlan, float]) -> StepLimit:
    limit = StepLimit(FLOOR_S)
    for step, seconds in steps:
        limit.learn(step, seconds)
    return limit


def test_quick_steps_have_the_floor() -> None:
    assert learned((DECODE, 0.01), (DECODE, 0.01)).of(DECODE) == FLOOR_S


def test_slow_steps_have_a_multiple_of_their_time() -> None:
    assert learned((PREFILL, 30.0), (PREFILL, 30.0)).of(PREFILL) == SLACK * 30.0


def test_the_first_steps_of_a_kind_have_time_to_compile() -> None:
    assert StepLimit(FLOOR_S).of(PREFILL) == MAX_NEW * FLOOR_S
    for new in (plan((0, 16)), plan((200, 1)), plan((100, 1), seal=True)):
        assert learned((DECODE, 0.01), (DECODE, 0.01)).of(new) >= MIN_NEW * FLOOR_S
    assert learned((DECODE, 0.01)).of(DECODE) == MIN_NEW * FLOOR_S, "the second as well"


def test_compilation_does_not_raise_later_limits() -> None:
    assert learned((DECODE, 60.0), (DECODE, 0.01)).of(DECODE) == FLOOR_S


def test_a_slow_step_is_forgotten_slowly() -> None:
    slow = [(DECODE, 0.01), (DECODE, 5.0)]
    after_ten = learned(*slow, *[(DECODE, 0.01)] * 10).of(DECODE)
    assert FLOOR_S < after_ten < SLACK * 5.0
    assert learned(*slow, *[(DECODE, 0.01)] * 1000).of(DECODE) == FLOOR_S


@pytest.mark.parametrize("chunk", [512, 2048])
def test_a_prompt_of_a_million_tokens_never_exceeds_its_limit(chunk: int) -> None:
    """Chunks take ever longer, the last one thousands of times the first."""
    limit = StepLimit(FLOOR_S)
    for start in range(0, 1 << 20, chunk):
        step = plan((start, chunk))
        seconds = 1e-3 + 1e-4 * chunk + 1e-7 * chunk * (start + chunk)
        assert seconds * SLACK / 3 < limit.of(step)
        limit.learn(step, seconds)


sizes = st.tuples(st.integers(0, 1 << 20), st.integers(1, 2048))


@given(
    steps=st.lists(st.lists(sizes, min_size=1, max_size=16), min_size=1, max_size=20),
    costs=st.tuples(*[st.floats(0, 1e-4)] * 3),
)
def test_no_step_that_costs_what_it_did_before_exceeds_its_limit(
    steps: list[list[tuple[int, int]]], costs: tuple[float, float, float]
) -> None:
    limit = StepLimit(1e-9)
    for sizes in steps:
        step = plan(*sizes)
        reads = sum(chunk.num_tokens * chunk.end for chunk in step.chunks)
        seconds = costs[0] + costs[1] * step.num_tokens + costs[2] * reads
        limit.learn(step, seconds)
        limit.learn(step, seconds)
    for sizes in steps:
        step = plan(*sizes)
        reads = sum(chunk.num_tokens * chunk.end for chunk in step.chunks)
        assert costs[0] + costs[1] * step.num_tokens + costs[2] * reads < limit.of(step)


def test_a_hang_in_a_new_kind_ends_too() -> None:
    assert learned((DECODE, 1.0)).of(plan((1 << 20, 2048))) == MAX_NEW * FLOOR_S
