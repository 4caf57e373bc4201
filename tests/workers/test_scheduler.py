"""What the next step computes: budgets of tokens and pages at their limits, and their order."""

from __future__ import annotations

import numpy as np
import pytest

from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.plan import StepPlan
from kvmesh.workers.pool_plan import PoolPlan
from kvmesh.workers.request import EngineRequest, PinTerms
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.scheduler import Scheduler
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import PageGeometry
from kvmesh.workers.step_budget import StepBudget, StepWork
from kvmesh.workers.step_draft import StepDraft

PAGE = 16


class Bench:
    """A scheduler whose steps are carried out by adding token 7 to each sampled sequence."""

    def __init__(
        self,
        *,
        sealed: int,
        tokens: int = 256,
        rows: int = 4,
        headroom: int = 16,
        sink: int = 0,
        recent: int = 0,
        prefix_cache: bool = False,
        budget: StepBudget | None = None,
    ) -> None:
        self.geometry = PageGeometry(PAGE, sink, recent, 4, 1)
        hot = rows * self.geometry.hot_per_sequence()
        pool = PoolPlan(hot, headroom, sealed, rows)
        self.scheduler = Scheduler(
            self.geometry,
            pool,
            max_num_batched_tokens=tokens,
            prefix_cache=prefix_cache,
            step_budget=budget,
        )
        self.sequences: dict[str, Sequence] = {}

    def add(
        self,
        name: str,
        prompt: int,
        *,
        max_tokens: int = 100,
        lease: LeaseTerms | None = None,
        suspicion: int = 0,
        token: int | None = None,
    ) -> Sequence:
        """Of `prompt` tokens, which differ from those of others unless `token` is given."""
        number = len(self.sequences) + 10 if token is None else token
        ids = np.full(prompt, number, np.int32)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        item = EngineRequest(name, ids, params, lease, suspicion=suspicion)
        seq = self.sequences[name] = Sequence(item, self.geometry, 10_000)
        seq.arrived_s = float(len(self.sequences))
        self.scheduler.add(seq)
        return seq

    def plan(self) -> dict[str, int]:
        """The tokens that the next step computes, by name; it is carried out."""
        plan = self.scheduler.schedule()
        if plan is None:
            return {}
        found = self.tokens_of(plan)
        for chunk, seq in self.scheduler.commit(plan):
            assert seq is not None
            if chunk.sample:
                seq.append(7)
                if seq.num_tokens == seq.max_tokens_total:
                    self.scheduler.remove(seq)
        self.scheduler.check()
        return found

    def tokens_of(self, plan: StepPlan) -> dict[str, int]:
        rows = {seq.row: name for name, seq in self.sequences.items() if seq.row is not None}
        return {rows[chunk.row]: chunk.num_tokens for chunk in plan.chunks}


def test_what_nobody_can_find_is_not_pinned() -> None:
    """A sequence that is computed again by itself, after NaN, names none of its pages."""
    bench = Bench(sealed=40, prefix_cache=True)
    terms = PinTerms("a", 60.0)
    for name, alone in (("shared", False), ("alone", True)):
        seq = bench.add(name, 4 * PAGE)
        bench.plan()
        if alone:
            bench.scheduler.isolate(seq)
            bench.plan()
        bench.scheduler.pin(seq, terms, now=0.0)
        assert seq.pinned_tokens == (0 if alone else 4 * PAGE)
    assert bench.scheduler.pins.pages.sealed == 4


def test_a_sequence_is_admitted_only_if_its_next_token_fits_too() -> None:
    """Otherwise it would compute its prompt, and be preempted by its own first token."""
    for prompt, admitted in ((2 * PAGE - 2, True), (2 * PAGE - 1, False)):
        bench = Bench(sealed=2)
        bench.add("a", PAGE)
        bench.plan()
        bench.add("b", prompt, max_tokens=1)
        assert ("b" in bench.plan()) == admitted, prompt


def test_pages_that_running_sequences_still_need_are_not_given_away() -> None:
    bench = Bench(sealed=4, tokens=PAGE)
    bench.add("a", 3 * PAGE)  # one page a step
    bench.add("b", PAGE + 1)
    assert bench.plan() == {"a": PAGE}
    bench.add("c", PAGE + 1)
    assert bench.plan() == {"a": PAGE} and bench.plan() == {"a": PAGE}
    assert bench.plan() == {"a": 1, "b": PAGE - 1}
    assert bench.plan() == {"a": 1, "b": 2}
    assert "c" not in bench.plan()


@pytest.mark.parametrize(
    "at",
    [
        2 * PAGE + 1,  # its token starts a page
        3 * PAGE,  # its token fills a page, which would be sealed
    ],
)
def test_a_sequence_that_is_preempted_leaves_the_step_and_its_tokens_to_others(at: int) -> None:
    """The youngest decodes, so it comes first; then the oldest needs its pages."""
    bench = Bench(sealed=at // PAGE, tokens=6)
    paused = [bench.add(name, 20, lease=LeaseTerms(name, 1, 1, 0, 9)) for name in ("old", "later")]
    while not all(seq.paused for seq in paused):
        bench.plan()
    youngest = bench.add("youngest", 3)
    while youngest.num_tokens < at:
        assert [*bench.plan()] == ["youngest"]
    row = youngest.row
    for seq in paused:
        seq.extend(LeaseTerms("grown", 1, 1, 9, 9))
    plan = bench.scheduler.schedule()
    assert plan is not None
    assert bench.tokens_of(plan) == {"old": 5, "later": 1}
    assert youngest.preemptions == 1
    assert row not in (*plan.hot.rows, *plan.sealed.rows)
    assert plan.seal_sealed == plan.sealed.ids, "pages of both that stay"


def test_nobody_is_preempted_for_a_page_that_the_next_result_brings() -> None:
    bench = Bench(sealed=1)
    bench.add("ends", 20, max_tokens=3)  # it has the page
    needy = bench.add("needy", 13)
    bench.plan()
    bench.plan()
    last = bench.scheduler.schedule()
    assert last is not None and bench.tokens_of(last) == {"ends": 1, "needy": 1}
    # The token after that fills a page of the other one, which has to be sealed.
    assert bench.scheduler.schedule() is None
    for _, seq in bench.scheduler.commit(last):
        assert seq is not None
        seq.append(7)
    bench.scheduler.remove(bench.sequences["ends"])
    assert bench.plan() == {"needy": 1}
    assert needy.sealed and not needy.preemptions


def with_a_twin(*, later: bool) -> tuple[Bench, dict[str, Sequence]]:
    """Two sequences with the same first page, of which the one decodes and the other, `twin`,
    computes a prompt; in between one that needs a page; at last one that decodes and has two.

    The next step seals the page of the twins, and the last one has to make room for it.
    later: they came one after the other, rather than all at the same time
    """
    bench = Bench(sealed=3, prefix_cache=False)
    lease = LeaseTerms("l", 1, 1, 0, 9)
    first = bench.add("first", 10, token=5, lease=lease)
    needy = bench.add("needy", 20, lease=lease)
    twin = bench.add("twin", 10, token=5, lease=lease)
    for _ in range(10):
        twin.append(7)  # what the first one generates
    while not (first.paused and needy.paused and twin.paused):
        bench.plan()
    last = bench.add("last", 3)
    while len(last.sealed) < 2:
        bench.plan()
    if not later:
        for seq in bench.sequences.values():
            seq.arrived_s = 0.0
    for seq in (first, needy, twin):
        seq.extend(LeaseTerms("l", 1, 1, 9, 9))
    return bench, bench.sequences


def test_a_page_that_an_older_one_seals_is_still_shared_after_a_preemption() -> None:
    bench, sequences = with_a_twin(later=True)
    plan = bench.scheduler.schedule()
    assert plan is not None and sequences["last"].preemptions == 1
    assert sequences["twin"].sealed == sequences["first"].sealed
    assert len(plan.seal_sealed) == bench.scheduler.cache.sealed.used == 2


def test_sequences_of_the_same_age_do_not_rely_on_each_other_in_a_step() -> None:
    """One of them may be preempted, and its page with it."""
    bench, sequences = with_a_twin(later=False)
    bench.scheduler.schedule()
    assert sequences["last"].preemptions == 1
    assert sequences["twin"].sealed != sequences["first"].sealed


def test_steps_are_numbered_and_preemptions_counted() -> None:
    bench = Bench(sealed=4)
    seq = bench.add("a", 3, max_tokens=9)
    for number in range(1, 4):
        plan = bench.scheduler.schedule()
        assert plan is not None and plan.step == number
        bench.scheduler.commit(plan)
        bench.scheduler.preempt_youngest()
        assert seq.preemptions == bench.scheduler.preemptions_total == number


def test_hot_headroom_is_shared_by_the_chunks_of_a_step() -> None:
    """Two pages more than sequences hold between steps: one chunk may cross two boundaries."""
    bench = Bench(sealed=20, headroom=2)
    bench.add("a", 5 * PAGE)
    bench.add("b", 5 * PAGE)
    assert bench.plan() == {"a": 3 * PAGE, "b": PAGE}
    # `b` has its own page, and what `a` leaves of the headroom.
    assert bench.plan() == {"a": 2 * PAGE, "b": 2 * PAGE}
    assert bench.plan() == {"a": 1, "b": 2 * PAGE}


@pytest.mark.parametrize(("sink", "recent"), [(1, 0), (0, 2), (1, 1)])
def test_windows_count_as_a_sequences_own_hot_pages(sink: int, recent: int) -> None:
    bench = Bench(sealed=20, headroom=1, sink=sink, recent=recent)
    bench.add("a", 9 * PAGE)
    own = sink + recent + 1
    assert bench.plan() == {"a": (own + 1) * PAGE}
    assert bench.plan() == {"a": 2 * PAGE}


def test_exact_pages_in_the_middle_of_a_prompt_are_evicted_before_those_at_an_end() -> None:
    """Another prompt is not likely to end there, however long the one before it was."""
    bench = Bench(sealed=60, recent=1, headroom=40, prefix_cache=True)
    bench.add("short", PAGE + 1, max_tokens=1)
    bench.plan()
    (arena,) = bench.scheduler.cache.hot.parts
    (end_of_short,) = arena.eviction_order
    bench.add("long", 24 * PAGE + 1, max_tokens=1)
    while bench.plan():
        pass
    evicted_before = arena.eviction_order.index(end_of_short)
    assert evicted_before == 24 - 3  # of 24 full pages an eighth is at the end


def test_prompts_are_computed_in_order_of_arrival_after_all_decoding() -> None:
    bench = Bench(sealed=20, tokens=10)
    bench.add("first", 4)
    assert bench.plan() == {"first": 4}
    bench.add("second", 21)
    bench.add("third", 5)
    assert bench.plan() == {"first": 1, "second": 9}
    assert bench.plan() == {"first": 1, "second": 9}
    assert bench.plan() == {"first": 1, "second": 3, "third": 5}
    assert [*bench.plan()] == ["first", "second", "third"]


def test_rows_limit_how_many_run_and_are_used_again() -> None:
    bench = Bench(sealed=20, rows=2)
    for name in "abc":
        bench.add(name, 3)
    assert bench.plan() == {"a": 3, "b": 3}
    bench.scheduler.remove(bench.sequences["a"])
    assert bench.plan() == {"b": 1, "c": 3}
    assert {seq.row for seq in bench.scheduler.running} == {0, 1}


def test_a_preempted_sequence_waits_in_its_place_and_nothing_overtakes_it() -> None:
    bench = Bench(sealed=3, rows=3)
    for name in "ab":
        bench.add(name, PAGE + 1, max_tokens=2 * PAGE)
    bench.plan()
    bench.add("late", 1, max_tokens=1)
    while not bench.scheduler.preemptions_total:
        found = bench.plan()
    assert bench.sequences["b"].preemptions == 1
    assert "b" not in found
    bench.add("later", 1, max_tokens=1)
    while bench.sequences["a"].row is not None:
        assert [*bench.plan()] == ["a"]
    assert [*bench.plan()] == ["b", "later"]


def test_a_sequence_at_its_maximum_length_needs_no_more() -> None:
    """Admission with a preempted sequence counts what each may still need, and no more."""
    bench = Bench(sealed=4)
    first = bench.add("first", 2 * PAGE + 1, max_tokens=PAGE)
    bench.plan()
    bench.scheduler.preempt_youngest()
    fits = bench.add("fits", 1, max_tokens=PAGE - 1)  # no sealed page at all
    assert set(bench.plan()) == {"first", "fits"}
    assert first.preemptions == 1 and fits.preemptions == 0
    bench.add("too long", 1, max_tokens=2 * PAGE)
    assert "too long" not in bench.plan()


def test_an_admission_that_failed_is_tried_again_when_pages_are_free() -> None:
    bench = Bench(sealed=3)
    bench.add("a", 2 * PAGE + 1)
    bench.add("b", 2 * PAGE + 1)
    assert [*bench.plan()] == ["a"]
    for _ in range(3):
        assert [*bench.plan()] == ["a"]
    bench.scheduler.remove(bench.sequences["a"])
    assert bench.plan() == {"b": 2 * PAGE + 1}


def test_an_admission_that_failed_is_tried_again_when_more_of_its_prompt_is_cached() -> None:
    bench = Bench(sealed=6, headroom=1, prefix_cache=True)
    bench.add("a", 4 * PAGE + 1, token=5)
    bench.add("b", 4 * PAGE + 1, token=5)
    assert bench.plan() == {"a": 2 * PAGE}
    assert [*bench.plan()] == ["a", "b"]
    assert bench.sequences["b"].cached_tokens == 2 * PAGE


def test_an_admission_that_failed_is_not_tried_again_for_pages_of_other_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(sealed=6, headroom=1, prefix_cache=True)
    bench.add("a", 4 * PAGE + 1)
    bench.add("b", 4 * PAGE + 1)
    assert bench.plan() == {"a": 2 * PAGE}
    monkeypatch.setattr(bench.scheduler.cache, "match", None)
    assert bench.plan() == {"a": 2 * PAGE}


def test_nobody_shares_what_an_isolated_sequence_seals_in_the_same_step() -> None:
    for isolated, pages in ((False, 2), (True, 4)):
        bench = Bench(sealed=8, prefix_cache=True)
        first = bench.add("first", 2 * PAGE + 1, token=5)
        first.shares_pages = not isolated
        bench.add("second", 2 * PAGE + 1, token=5)
        assert bench.plan() == {"first": 2 * PAGE + 1, "second": 2 * PAGE + 1}
        assert bench.scheduler.cache.sealed.used == pages


def test_nobody_finds_what_an_isolated_sequence_has_computed() -> None:
    bench = Bench(sealed=9, prefix_cache=True)
    first = bench.add("first", 2 * PAGE + 1, token=5)
    bench.plan()
    bench.scheduler.isolate(first)
    bench.add("second", 2 * PAGE + 1, token=5)
    assert bench.plan() == {"first": 2 * PAGE + 2, "second": 2 * PAGE + 1}


def test_an_isolated_sequence_is_computed_again_whatever_was_in_flight_for_it() -> None:
    bench = Bench(sealed=9)
    first = bench.add("first", PAGE + 1)
    bench.plan()
    plan = bench.scheduler.schedule()
    assert plan is not None and first.pending == 1
    bench.scheduler.isolate(first)
    assert [seq for _, seq in bench.scheduler.commit(plan)] == [None]
    assert bench.plan() == {"first": PAGE + 2}


def test_nobody_shares_what_a_preempted_sequence_would_have_sealed_in_this_step() -> None:
    bench = Bench(sealed=4)
    first, second = bench.add("first", PAGE, token=5), bench.add("second", PAGE, token=5)
    digest = first.digests(1)[0]
    first.row, first.hot, first.sealed = 0, {0: 1}, {0: 2}
    draft = StepDraft(256, [16])
    draft.add_chunk(first, 0, PAGE)
    draft.seal(first, 0, digest)
    assert draft.being_sealed(second, digest) == 2
    assert (draft.tokens_left, draft.work.prompt_tokens) == (256 - PAGE, PAGE)
    assert draft.finish(1).plan.seal_pages == [0]
    draft.undo(first)
    assert draft.being_sealed(second, digest) is None
    assert (draft.tokens_left, draft.work) == (256, StepWork())
    assert not draft.finish(1).plan.chunks and not draft.finish(1).plan.seal_pages


def test_a_repeated_prompt_of_whole_pages_and_a_token_computes_the_token_alone() -> None:
    bench = Bench(sealed=9, prefix_cache=True)
    for name, computed in (("first", 2 * PAGE + 1), ("second", 1)):
        bench.add(name, 2 * PAGE + 1, token=5)
        assert bench.plan()[name] == computed


class FixedBudget(StepBudget):
    """So many tokens of prompts in a step in which a sequence decodes. starts: it was asked for"""

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__(1.0)
        self.prompt_tokens = prompt_tokens
        self.starts: list[int] = []

    def chunk_tokens(self, work: StepWork, start: int) -> int:
        assert start >= 0
        self.starts.append(start)
        return self.prompt_tokens - work.prompt_tokens if work.decoding else 10_000


def test_the_budget_of_a_step_limits_its_prompts_and_not_its_decoding() -> None:
    budget = FixedBudget(8)
    bench = Bench(sealed=20, tokens=20, budget=budget)
    bench.add("a", 3)
    assert bench.plan() == {"a": 3}
    bench.add("b", 20)
    bench.add("c", 30)
    assert bench.plan() == {"a": 1, "b": 8}
    assert bench.plan() == {"a": 1, "b": 8}
    assert bench.plan() == {"a": 1, "b": 4, "c": 4}
    assert {8, 16} <= set(budget.starts)
    budget.prompt_tokens = 0
    assert bench.plan() == {"a": 1, "b": 1}
    budget.prompt_tokens = 10_000
    assert bench.plan() == {"a": 1, "b": 1, "c": 18}, "the step has no more tokens"


def test_the_audit_finds_pages_and_rows_that_nothing_holds() -> None:
    bench = Bench(sealed=4)
    bench.add("a", PAGE + 1)
    bench.add("b", 1)
    bench.plan()
    bench.scheduler.cache.hot.take(0)
    message = (
        "3 hot and 1 sealed pages are in use, 2 hot and 1 sealed pages held by sequences: "
        "a holds 1 hot and 1 sealed pages, b holds 1 hot and 0 sealed pages"
    )
    with pytest.raises(AssertionError, match=message):
        bench.scheduler.check()
    bench = Bench(sealed=4)
    bench.scheduler.cache.hot.take(0)
    with pytest.raises(AssertionError, match=r"0 sealed pages held by .*: no sequence runs"):
        bench.scheduler.check()
    bench = Bench(sealed=4)
    bench.scheduler._free_rows.pop()
    with pytest.raises(AssertionError, match="3 rows of 4"):
        bench.scheduler.check()
