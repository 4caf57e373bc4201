"""Limits of steps: learned from their times, generous to slow and to new ones."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given

from kvmesh.workers.plan import Chunk, StepPlan, TableUpdate
from kvmesh.workers.step_limit import FADE, MAX_NEW, MIN_NEW, SLACK, StepLimit
from tests.exercised import Exercised
from tests.scenarios import SEEDS, scenarios

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


SEEN = Exercised(
    "step limit",
    {
        "limits of known kinds": 500,
        "limits of steps larger than any before": 40,
        "long contexts": 100,
    },
)


@SEEN.required
@scenarios(100)
@given(seed=SEEDS)
def test_no_step_that_costs_what_it_did_before_exceeds_its_limit(seed: int) -> None:
    chance = Random(seed)
    costs = [chance.choice([0.0, chance.uniform(0, 1e-4)]) for _ in range(3)]
    limit = StepLimit(1e-9)

    def random_step() -> StepPlan:
        bits = chance.randrange(4, 21)
        chunks = [(chance.getrandbits(bits), chance.randrange(1, 2049)) for _ in range(4)]
        return plan(*chunks[: chance.randrange(1, 5)])

    def cost_s(step: StepPlan) -> float:
        reads = sum(chunk.num_tokens * chunk.end for chunk in step.chunks)
        return costs[0] + costs[1] * step.num_tokens + costs[2] * reads

    steps = [random_step() for _ in range(chance.randrange(1, 20))]
    for step in steps:
        limit.learn(step, cost_s(step))
        limit.learn(step, cost_s(step))
    for step in steps:
        SEEN.add("limits of known kinds")
        SEEN.add("long contexts", max(chunk.end for chunk in step.chunks) > 1 << 16)
        assert cost_s(step) < limit.of(step)
    larger = plan((1 << 20, 2048), (1 << 20, 2048), (1 << 20, 2048), (1 << 20, 2048), (0, 1))
    slowest_s = max(map(cost_s, steps))
    if slowest_s:
        SEEN.add("limits of steps larger than any before")
        assert slowest_s < limit.of(larger) <= SLACK * slowest_s


SIX = plan((100, 6))  # reads 636


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (plan((100, 6)), 1),
        (plan((90, 6)), 1),  # less to read, but no faster for that
        (plan((106, 6)), 112 / 106),  # reads
        (plan((64, 6), (100, 6)), 2),  # tokens, twice as many
        (plan((100, 6), (100, 6), (100, 6)), 3),  # both
        (plan((0, 7), (100, 4)), 11 / 6),  # tokens more than reads
    ],
)
def test_a_known_kind_is_bounded_by_what_it_computes_and_what_it_reads(
    step: StepPlan, factor: float
) -> None:
    limit = StepLimit(1e-9)
    for _ in range(2):
        limit.learn(SIX, 3.0)
    assert limit.of(step) == pytest.approx(SLACK * 3.0 * factor)


@pytest.mark.parametrize(
    "other",
    [
        plan((100, 8)),  # a longer chunk
        plan((100, 3)),  # a shorter one
        plan((122, 6)),  # a longer context
        plan((57, 6)),  # a shorter one
        plan((100, 6), (200, 1)),  # of another sequence
        plan((100, 6), seal=True),
    ],
)
def test_steps_of_other_sizes_are_of_another_kind(other: StepPlan) -> None:
    limit = StepLimit(1.0)
    for _ in range(2):
        limit.learn(SIX, 1e-9)
    assert limit.of(SIX) == 1.0
    assert limit.of(other) == MIN_NEW, "it may have to be compiled"
    assert limit.of(plan((98, 6), (1, 5))) == 1.0, "the longest chunk and context count"


def test_a_new_kind_has_the_lowest_bound_of_the_known_steps() -> None:
    limit = StepLimit(0.001)
    for step, seconds in ((plan((100, 1)), 9.0), (plan((500, 400)), 0.2), (plan((9, 300)), 8.0)):
        limit.learn(step, seconds)
    step = plan((500, 450), seal=True)
    assert limit.of(step) == pytest.approx(SLACK * 0.2 * (450 * 950) / (400 * 900))
    # Thousands of times as much as any step: the slowest one caps it.
    assert limit.of(plan((1 << 20, 2048))) == pytest.approx(SLACK * 9.0)
    assert StepLimit(0.001).of(step) == pytest.approx(MAX_NEW * 0.001)


def test_the_second_step_of_a_kind_counts_whatever_the_first_took() -> None:
    for first_s in (60.0, 0.01):
        assert learned((DECODE, first_s), (DECODE, 3.0)).of(DECODE) == SLACK * 3.0


def test_a_step_slower_for_its_size_than_the_slowest_replaces_it() -> None:
    small, large = plan((1000, 5)), plan((1000, 7))
    slower = learned((large, 0.0), (large, 7.0), (small, 6.9))
    assert slower.of(small) == pytest.approx(SLACK * 7.0 * FADE), "less than the larger one took"
    slower = learned((large, 0.0), (large, 7.0), (small, 7.0))
    assert slower.of(small) == pytest.approx(SLACK * 7.0)
    # Fading concerns the time alone: it remains the time of the larger step.
    assert learned((small, 0.0), (small, 5.0), (large, 1.0)).of(small) == pytest.approx(
        SLACK * 5.0 * FADE
    )


def test_a_hang_in_a_new_kind_ends_too() -> None:
    assert learned((DECODE, 1.0)).of(plan((1 << 20, 2048))) == MAX_NEW * FLOOR_S
