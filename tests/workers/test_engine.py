"""The engine's bookkeeping under random load, with an executor that checks every read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, note

from kvmesh.workers import pool_plan, prefix_cache
from kvmesh.workers.arena import Arena
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.engine import NOT_SOUND, Engine
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.loads import OLDEST, EngineInfo, SequenceLoad, StepTime
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult
from kvmesh.workers.prefix_cache import PageDigests
from kvmesh.workers.request import (
    EndReason,
    EngineRequest,
    PinTerms,
    PrefillProgress,
    SampledLogprobs,
    SequenceDelta,
)
from kvmesh.workers.request_check import unknown_token
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.scoring.gate import FormatCheck
from kvmesh.workers.sizes import BLOCK_PAGES, PageGeometry, PageNeed
from kvmesh.workers.step_budget import DEFAULT_MAX_STEP_S
from kvmesh.workers.structured.grammar import regex
from tests.exercised import Exercised
from tests.scenarios import SEEDS, check, scenarios
from tests.workers.engine_calls import PAGE as PAGE
from tests.workers.engine_calls import Call, random_call, random_setup
from tests.workers.engine_machine import EngineMachine
from tests.workers.memory_executor import (
    TP,
    VOCAB,
    MemoryExecutor,
    expected_output,
    expected_scores,
)


def make_engine(
    *,
    sink: int = 0,
    recent: int = 0,
    budget: int = 200,
    seqs: int = 4,
    tokens: int = 16,
    prefix_cache: bool = True,
    in_flight: int = 1,
) -> tuple[Engine, MemoryExecutor]:
    executor = MemoryExecutor(PAGE, sink, recent, budget)
    executor.max_in_flight = in_flight
    config = EngineConfig(
        model="memory",
        page_size=PAGE,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        prefix_cache=prefix_cache,
    )
    return Engine(config, executor), executor


def request(name: str, prompt: list[int], max_tokens: int = 10, **kwargs: object) -> EngineRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    fields = {"params": params, **kwargs}
    return EngineRequest(name, prompt_token_ids=np.array(prompt, np.int32), **fields)  # type: ignore[arg-type]


def run(engine: Engine) -> dict[str, list[SequenceDelta]]:
    deltas: dict[str, list[SequenceDelta]] = {}
    for _ in range(20_000):
        if not engine.has_work:
            break
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.check_integrity()
    assert not engine.has_work, "the engine does not finish"
    return deltas


def tokens_of(deltas: list[SequenceDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


# About half of what runs see on average, a fifth of what is rare.
SEEN = Exercised(
    "engine",
    {
        "admissions": 1200,
        "prefix hits": 400,
        "hits of a whole prompt": 250,
        "partly evicted prefixes": 20,
        "evictions": 1500,
        "one form evicted, the other kept": 600,
        "pages sealed for two": 10,
        "blocks held": 60,
        "preemptions": 60,
        "penalised outputs that are partly cached": 2,
        "pauses": 20,
        "growths": 50,
        "aborts in mid-prefill": 5,
        "deadlines": 70,
        "reused ids with another deadline": 10,
        "resumed sequences": 80,
        "outputs cut by stop tokens": 80,
        "refusals": 2,
        "trials": 200,
        "sequences at fault": 100,
        "recomputations for another's fault": 1,
        "prompts scored in several pieces": 30,
        "preemptions of sequences with scores": 5,
        "overlapping steps": 8000,
        "tokens computed before they are known": 12000,
        "tokens beyond the end": 100,
        "preemptions with a token in flight": 25,
        "aborts in flight": 15,
        "faults while the next step was in flight": 40,
        "sequences on several ranks": 100,
        "sequences too short to know their deal": 100,
        "pins": 80,
        "pins beyond their bounds": 20,
        "pins that hold cached pages": 200,
        "pins that have expired": 8,
        "pinned pages that were needed": 4,
    },
)


@SEEN.required
@scenarios(120)
@given(seed=SEEDS)
def test_output_depends_on_the_prompt_alone(seed: int) -> None:
    """Not on the batch, on chunks, the cache, preemption, pauses, or on what others compute."""
    chance = Random(seed)
    setup = random_setup(chance)

    def run(calls: Sequence[Call]) -> None:
        machine = EngineMachine(setup, SEEN)
        for call in calls:
            machine.call(call)
        machine.finish()

    note(f"{setup}")
    check(run, [random_call(chance) for _ in range(chance.randrange(10, 40))])


@pytest.mark.parametrize("rest", [0, 3])
@pytest.mark.parametrize(("recent", "sink"), [(0, 0), (1, 0), (2, 1)])
def test_a_warm_prefix_cache_saves_whole_pages(recent: int, sink: int, rest: int) -> None:
    """All but the last, if the prompt consists of whole pages: one token has to be computed."""
    engine, executor = make_engine(recent=recent, sink=sink, tokens=64)
    prompt = [int(i) % VOCAB for i in range(5 * PAGE + rest)]
    engine.add(request("cold", prompt))
    cold = run(engine)["cold"]
    before = executor.sealed_pages
    engine.add(request("warm", prompt))
    warm = run(engine)["warm"]
    assert tokens_of(warm) == tokens_of(cold)
    assert cold[-1].usage and cold[-1].usage.cached_tokens == 0
    assert warm[-1].usage and warm[-1].usage.cached_tokens == (5 if rest else 4) * PAGE
    # The pages it shares are not sealed again; those after the prompt were sealed before, too.
    assert executor.sealed_pages == before
    assert engine.loads().cached_tokens_total == warm[-1].usage.cached_tokens


def test_a_document_is_evicted_from_its_end() -> None:
    engine, _ = make_engine(tokens=64, budget=60, seqs=1)
    total = engine.info.capacity.sealed
    document = [i * i % VOCAB for i in range((total - 1) * PAGE + 1)]
    engine.add(request("document", document, 1))
    run(engine)
    assert engine.loads().pool.sealed.cached == total - 1
    # Takes the page that is free, and two of the document's.
    engine.add(request("other", [7] * (3 * PAGE + 1), 1))
    run(engine)
    engine.add(request("again", document, 1))
    usage = run(engine)["again"][-1].usage
    assert usage and usage.cached_tokens == (total - 3) * PAGE


def test_pages_are_released_in_the_order_in_which_they_can_be_spared() -> None:
    engine, _ = make_engine(sink=1, recent=1, tokens=128)
    document = [i * i % VOCAB for i in range(6 * PAGE + 1)]
    engine.add(request("r", document, 1))
    run(engine)
    digests = PageDigests(PAGE, "").upto(np.array(document, np.int32), 6)
    cache = engine.scheduler.cache

    def in_order(arena: Arena) -> list[int]:
        """Pages of the document, the next to be evicted first."""
        return [digests.index(arena._keys[page]) for page in arena.eviction_order]

    assert in_order(cache.sealed.parts[0]) == [4, 3, 2, 1]
    # Those that left the window while it ran, then the window, then the sink.
    assert in_order(cache.hot.parts[0]) == [1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize(
    ("sink", "recent", "budget", "shorts"),
    [(0, 0, 70, 6), (1, 0, 110, 7), (1, 1, 135, 12), (2, 2, 160, 12)],
)
def test_another_question_finds_a_long_document_after_many_short_prompts(
    sink: int, recent: int, budget: int, shorts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need more than twice the pages that are spare, and eviction in the order of release
    would lose all of the document."""
    monkeypatch.setattr(prefix_cache, "ATTENTION_TOKENS", 8 * PAGE)
    monkeypatch.setattr(pool_plan, "CACHED_HOT_SHARE", 0.5)
    engine, _ = make_engine(tokens=64, seqs=3, sink=sink, recent=recent, budget=budget)
    total = engine.info.capacity.sealed
    length = total * 2 // 3
    document = [i * i % VOCAB for i in range(length * PAGE)]

    def ask(question: int) -> int:
        """How many of the document's pages were cached."""
        name = f"question {question}"
        engine.add(request(name, [*document, *[question] * (PAGE + 3)], 1))
        usage = run(engine)[name][-1].usage
        assert usage is not None
        return usage.cached_tokens // PAGE

    def short(number: int) -> None:
        tokens = [number % 50, number // 50, *[7] * (5 * PAGE)]
        engine.add(request(f"short {number}", tokens, 3))
        run(engine)

    assert ask(1) == 0
    assert 5 * shorts > 2 * (total - length - 1)
    for number in range(shorts):
        short(number)
    assert ask(2) == length
    for number in range(shorts, 12 * shorts):
        short(number)
    assert ask(3) < length, "in the end what is not used again is evicted"


class TickingExecutor(MemoryExecutor):
    """A step takes `step_s` on the engine's clock."""

    now_s = 0.0
    step_s = 0.4

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        self.now_s += self.step_s
        return super().execute(plan, masks)


def make_ticking_engine(*, prefix_cache: bool = True) -> Engine:
    executor = TickingExecutor(PAGE, 0, 0, 200)
    config = EngineConfig(
        model="memory",
        page_size=PAGE,
        max_num_seqs=4,
        max_num_batched_tokens=PAGE,
        prefix_cache=prefix_cache,
    )
    return Engine(config, executor, lambda: executor.now_s)


def progress_of(deltas: list[SequenceDelta]) -> list[PrefillProgress]:
    return [delta.progress for delta in deltas if delta.progress is not None]


def test_a_long_prefill_reports_its_progress_once_a_second() -> None:
    engine = make_ticking_engine()
    prompt = [i % VOCAB for i in range(10 * PAGE)]
    engine.add(request("cold", prompt))
    deltas = run(engine)["cold"]
    expected = [PrefillProgress(pages * PAGE, 0, 10 * PAGE) for pages in (3, 6, 9)]
    assert progress_of(deltas) == expected
    assert all(not delta.token_ids for delta in deltas[:3])
    assert tokens_of(deltas) == expected_output(prompt, 10)
    engine.add(request("warm", prompt + prompt))
    (first, *_) = progress_of(run(engine)["warm"])
    assert first == PrefillProgress(13 * PAGE, 10 * PAGE, 20 * PAGE)


def test_progress_is_due_when_a_second_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TickingExecutor, "step_s", 0.5)
    engine = make_ticking_engine()
    engine.add(request("r", [i % VOCAB for i in range(5 * PAGE)]))
    found = progress_of(run(engine)["r"])
    assert found == [PrefillProgress(pages * PAGE, 0, 5 * PAGE) for pages in (2, 4)]


def test_a_short_prefill_and_decode_report_no_progress() -> None:
    engine = make_ticking_engine()
    engine.add(request("r", [2] * 2 * PAGE))
    deltas = run(engine)["r"]
    assert not progress_of(deltas)
    assert all(delta.token_ids for delta in deltas)


def test_a_preempted_sequence_reports_its_progress_again() -> None:
    engine = make_ticking_engine(prefix_cache=False)
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    engine.add(request("r", [3], params=params))
    output: list[int] = []
    while len(output) < 5 * PAGE:
        output.extend(tokens_of(engine.step()))
    engine.scheduler.preempt_youngest()
    deltas = run(engine)["r"]
    total = 1 + 5 * PAGE
    assert progress_of(deltas) == [PrefillProgress(pages * PAGE, 0, total) for pages in (1, 4)]
    assert output + tokens_of(deltas) == expected_output([3], 200, ignore_eos=True)


def test_prefix_cache_respects_the_salt() -> None:
    engine, _ = make_engine()
    prompt = list(range(40))
    engine.add(request("a", prompt, cache_salt="tenant a"))
    run(engine)
    engine.add(request("b", prompt, cache_salt="tenant b"))
    usage = run(engine)["b"][-1].usage
    assert usage and usage.cached_tokens == 0


def test_preempts_the_youngest_once_and_finishes_all() -> None:
    engine, _ = make_engine(budget=62, seqs=3, tokens=32)
    params = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    for name in "abc":
        # Each fits alone; the three together do not.
        engine.add(request(name, [ord(name) % VOCAB] * 9, params=params))
    deltas = run(engine)
    assert engine.scheduler.preemptions_total > 0
    for name in "abc":
        whole = expected_output([ord(name) % VOCAB] * 9, 300, ignore_eos=True)
        assert tokens_of(deltas[name]) == whole
    preemptions = {name: deltas[name][-1].usage.preemptions for name in "abc"}  # type: ignore[union-attr]
    assert preemptions["a"] == 0 and max(preemptions.values()) == 1
    assert sum(preemptions.values()) == engine.loads().preemptions_total


@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 1.2}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}],
)
def test_penalties_know_the_output_of_which_a_part_is_cached(penalty: dict[str, float]) -> None:
    engine, executor = make_engine(tokens=16)
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True, **penalty)  # type: ignore[arg-type]
    engine.add(request("r", [3] * 5, params=params))
    output: list[int] = []
    while len(output) < 50:
        output += tokens_of(engine.step())
    engine.scheduler.preempt_youngest()
    output += tokens_of(run(engine)["r"])
    assert output == expected_output([3] * 5, 80, ignore_eos=True)
    first, again = [start for plan in executor.plans for start in plan.row_starts]
    assert first.history == b""
    # The executor compares what follows with the whole sequence.
    history = np.frombuffer(again.history, np.int32).tolist()
    assert history == [3] * 5 + output[: 3 * PAGE - 5]


def test_host_work_of_a_decode_step_does_not_grow_with_context() -> None:
    engine, executor = make_engine(budget=400, tokens=64)
    engine.add(request("long", [3] * 300, 60))
    run(engine)
    decode = [plan for plan in executor.plans if plan.num_tokens == 1]
    assert len(decode) > 2 * PAGE
    for plan in decode:
        (chunk,) = plan.chunks
        starts_page, fills_page = chunk.start % PAGE == 0, chunk.end % PAGE == 0
        assert len(plan.hot.ids) == starts_page
        assert len(plan.sealed.ids) == len(plan.seal_hot) == fills_page
        assert not plan.row_starts


def test_resumed_tokens_are_not_emitted_again() -> None:
    engine, _ = make_engine()
    prompt = [5, 6, 7, 8]
    whole = expected_output(prompt, 20)
    assert len(whole) > 3, "choose a prompt that does not end at once"
    engine.add(request("r", prompt + whole[:3], 20, resumed_tokens=3))
    deltas = run(engine)["r"]
    assert tokens_of(deltas) == whole[3:]
    assert deltas[-1].usage and deltas[-1].usage.completion_tokens == len(whole)


def test_stop_tokens_min_tokens_and_length() -> None:
    engine, _ = make_engine()
    prompt = [5, 6, 7, 8]
    whole = expected_output(prompt, 30)
    stop = whole[2]
    first = whole.index(stop) + 1
    for min_tokens in (0, first, first + 1):
        params = SamplingParams(
            temperature=0.0, max_tokens=30, stop_token_ids=(stop,), min_tokens=min_tokens
        )
        engine.add(request("s", prompt, params=params))
        deltas = run(engine)["s"]
        last = deltas[-1]
        if min_tokens <= first:
            assert tokens_of(deltas) == whole[:first]
            assert (last.finish_reason, last.matched_stop_token) == (EndReason.STOP, stop)
        else:
            assert len(tokens_of(deltas)) > first
    engine.add(request("l", prompt, 2))
    last = run(engine)["l"][-1]
    assert (last.finish_reason, last.matched_stop_token) == (EndReason.LENGTH, None)


def test_deadline_ends_a_sequence_and_frees_its_pages() -> None:
    now = [0.0]
    executor = MemoryExecutor(PAGE, 0, 0, 200)
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16)
    engine = Engine(config, executor, clock=lambda: now[0])
    engine.add(request("slow", [3] * 30, 300, timeout_s=5.0))
    engine.add(request("free", [4] * 30, 3))
    engine.step()
    now[0] = 5.0
    deltas = run(engine)
    assert deltas["slow"][-1].finish_reason is EndReason.DEADLINE
    assert deltas["free"][-1].finish_reason is EndReason.LENGTH
    assert engine.loads().pool.sealed.used == 0


def test_a_reused_id_does_not_inherit_a_deadline() -> None:
    now = [0.0]
    executor = MemoryExecutor(PAGE, 0, 0, 200)
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16)
    engine = Engine(config, executor, clock=lambda: now[0])
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    for timeout_s in (5.0, 7.0, None):
        engine.add(request("r", [3], params=params, timeout_s=timeout_s))
        engine.step()
        if timeout_s is not None:
            engine.abort("r")
            now[0] += 1.0
    now[0] = 6.0
    engine.step()
    assert engine.has_work, "the first one's deadline"
    now[0] = 9.0
    deltas = run(engine)["r"]
    assert deltas[-1].finish_reason is EndReason.LENGTH
    assert engine.deadline_s() is None


def test_a_sequence_is_aborted_once() -> None:
    engine, _ = make_engine()
    engine.add(request("r", [3] * 4))
    ended = engine.abort("r")
    assert ended is not None and ended.finish_reason is EndReason.ABORT
    assert engine.abort("r") is None


def test_a_pinned_prompt_stays_cached_for_its_time() -> None:
    now = [0.0]
    executor = MemoryExecutor(PAGE, 0, 0, 200)
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=64)
    engine = Engine(config, executor, clock=lambda: now[0])
    pin = PinTerms("owner", 5.0)
    engine.add(request("r", [3] * (2 * PAGE + 1), 2, pin=pin))
    engine.step()
    assert (engine.loads().pinned_pages, engine.deadline_s()) == (2, 5.0)
    now[0] = 3.0
    (delta,) = engine.step()
    assert delta.usage is not None and delta.usage.pinned_tokens == 2 * PAGE
    assert (delta.usage.time_to_first_token_s, delta.usage.total_s) == (0.0, 3.0)
    now[0] = 4.0
    engine.step()
    assert (engine.loads().pinned_pages, engine.deadline_s()) == (2, 4.0), "from its end on"
    now[0] = 8.0
    engine.step()
    assert (engine.loads().pinned_pages, engine.deadline_s()) == (0, None)


@pytest.mark.parametrize("aborted", [False, True])
def test_a_prompt_without_output_is_scored_and_pinned_once_it_is_computed(aborted: bool) -> None:
    engine, _ = make_engine(tokens=PAGE + 5)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    prompt = [i % VOCAB for i in range(2 * PAGE + 1)]
    engine.add(request("r", prompt, params=params, pin=PinTerms("owner", 5.0)))
    deltas = engine.step()
    if aborted:
        engine.abort("r")
        assert engine.loads().pinned_pages == 0
        return
    deltas += engine.step()
    scores = [np.frombuffer(x.scores.logprobs, np.float32) for x in deltas if x.scores is not None]
    assert np.concatenate(scores).tolist() == pytest.approx(expected_scores(prompt))
    assert len(scores) == 2 and not tokens_of(deltas)
    last = deltas[-1]
    assert last.finish_reason is EndReason.LENGTH and last.usage is not None
    assert last.usage.pinned_tokens == 2 * PAGE == engine.loads().pinned_pages * PAGE


@pytest.mark.parametrize(
    ("token", "error"),
    [
        (SampledToken(-1, fault="NaN"), "NaN"),
        (SampledToken(VOCAB), f"the sampled token is not valid: {unknown_token(VOCAB, VOCAB)}"),
        (SampledToken(-2), f"the sampled token is not valid: {unknown_token(-2, VOCAB)}"),
    ],
)
def test_a_sequence_at_fault_is_computed_again_alone_before_it_ends(
    token: SampledToken, error: str
) -> None:
    engine, executor = make_engine()
    execute = executor.execute

    def faulty(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        return StepResult(plan.step, [token for _ in execute(plan).tokens], 0.0)

    executor.execute = faulty  # type: ignore[method-assign]
    engine.add(request("r", [3] * 4))
    assert engine.step() == []
    assert not engine.scheduler.waiting[0].shares_pages
    (delta,) = engine.step()
    assert (delta.finish_reason, delta.error) == (EndReason.FAULT, error)
    assert not engine.has_work


def test_a_prompt_whose_scores_are_not_sound_is_computed_again_alone_before_it_ends() -> None:
    engine, executor = make_engine()
    execute = executor.execute

    def unsound(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        result = execute(plan)
        scored = [chunk for chunk in plan.chunks if chunk.targets]
        scores = [
            msgspec.structs.replace(found, sound=bytes([7]) not in chunk.tokens)
            for chunk, found in zip(scored, result.scores, strict=True)
        ]
        return msgspec.structs.replace(result, scores=scores)

    executor.execute = unsound  # type: ignore[method-assign]
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    engine.add(request("bad", [7] * 4, params=params), request("good", [3] * 4, params=params))
    scores, token = engine.step()
    assert (scores.request_id, token.request_id) == ("good", "good")
    assert scores.scores is not None and token.token_ids
    (bad,) = engine.scheduler.waiting
    assert (bad.request.request_id, bad.shares_pages, bad.num_scored) == ("bad", False, 0)
    ends = {delta.request_id: delta for delta in engine.step()}
    assert (ends["bad"].finish_reason, ends["bad"].error) == (EndReason.FAULT, NOT_SOUND)
    assert ends["good"].finish_reason is EndReason.LENGTH


def test_those_that_remain_of_a_step_get_their_tokens() -> None:
    engine, _ = make_engine(in_flight=2)
    for name in "ab":
        engine.add(request(name, [3] * 4))
    engine.step()
    engine.abort("a")
    assert [delta.request_id for delta in engine.step()] == ["b"]


class UnequalExecutor(MemoryExecutor):
    """The second of its ranks has less memory."""

    allocation: Allocation | None = None

    def describe(self) -> list[RankDescription]:
        first, second = super().describe()
        return [first, msgspec.structs.replace(second, kv_budget_bytes=60)]

    def allocate(self, allocation: Allocation) -> None:
        self.allocation = allocation
        super().allocate(allocation)


def test_the_pool_is_what_the_smallest_rank_can_hold() -> None:
    executor = UnequalExecutor(PAGE, 1, 1, 200, max_model_len=100)
    config = EngineConfig(
        model="memory", page_size=PAGE, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=90
    )
    engine = Engine(config, executor)
    # 60 bytes: hot pages of 4 bytes for two sequences and a step, then sealed ones of 1 byte.
    assert executor.allocation == Allocation(7, 32, max_rows=2, max_pages_per_row=6)
    info = engine.info
    assert (info.capacity, info.max_num_seqs, info.max_model_len) == (PageNeed(6, 32), 2, 90)
    assert info.capacity_bytes == 2 * (6 * 4 + 32)
    assert (info.model, info.model_revision, info.dtype) == ("memory", "0", "float32")
    assert (info.kv_format, info.tp, info.vocab_size) == ("k8v4", 1, VOCAB)
    assert info.prefix_cache
    assert info.epoch != Engine(config, UnequalExecutor(PAGE, 1, 1, 200)).info.epoch


def described(kvp: int = 1, **changes: object) -> MemoryExecutor:
    """Its ranks describe themselves like this."""
    executor = MemoryExecutor(PAGE, 1, 2, 400, kvp=kvp)
    executor._description = msgspec.structs.replace(executor._description, **changes)
    return executor


@pytest.mark.parametrize("kvp", [1, 2])
def test_an_engine_tells_what_its_ranks_are_and_how_it_is_configured(kvp: int) -> None:
    executor = described(
        kvp,
        model="m",
        model_revision="7",
        dtype="bfloat16",
        rope="yarn",
        operators="far keys: torch",
        kv_format="int8",
        hot_page_bytes=3,
        sealed_page_bytes=2,
    )
    config = EngineConfig(
        model="memory",
        page_size=PAGE,
        max_num_seqs=3,
        max_num_batched_tokens=40,
        tp=TP,
        kvp=kvp,
        max_pinned_share=0.5,
        max_pinned_share_per_key=0.25,
    )
    info = Engine(config, executor, check=FormatCheck(0.5, "it hurts")).info
    assert info == EngineInfo(
        epoch=info.epoch,
        model="m",
        model_revision="7",
        kv_format="int8",
        dtype="bfloat16",
        tp=TP,
        geometry=PageGeometry(
            page_size=PAGE,
            sink_pages=1,
            recent_pages=2,
            hot_page_bytes=3,
            sealed_page_bytes=2,
            ranks=TP * kvp,
            kvp=kvp,
        ),
        capacity=info.capacity,
        max_model_len=800,
        vocab_size=VOCAB,
        max_num_seqs=3,
        max_num_batched_tokens=40,
        rope="yarn",
        operators="far keys: torch",
        max_pinned_pages=int(0.25 * info.capacity.sealed * kvp),
        kv_divergence_nats=0.5,
        kv_format_warning="it hurts",
    )


@pytest.mark.parametrize(("state_bytes", "wanted"), [(0, False), (8, False), (0, True), (8, True)])
def test_a_model_with_recurrent_layers_has_no_prefixes_to_keep(
    state_bytes: int, wanted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(
        model="m", page_size=PAGE, max_num_seqs=3, max_num_batched_tokens=40, prefix_cache=wanted
    )
    executor = described(state_bytes=state_bytes)
    executor.num_ranks = 1
    with caplog.at_level("INFO"):
        engine = Engine(config, executor)
    keeps = wanted and not state_bytes
    assert (engine.info.geometry.state_bytes, engine.info.geometry.ranks) == (state_bytes, 1)
    assert engine.info.prefix_cache is engine.scheduler.cache.enabled is keeps
    assert (engine.info.max_pinned_pages > 0) is keeps
    assert ("its prefix cache is off" in caplog.text) is (wanted and not keeps)


def test_nothing_is_pinned_where_no_page_may_be() -> None:
    config = EngineConfig(
        model="m", page_size=PAGE, max_num_seqs=3, max_num_batched_tokens=40, max_pinned_share=0.0
    )
    engine = Engine(config, described())
    engine.add(request("r", [3] * (PAGE + 1), 1, pin=PinTerms("owner", 5.0)))
    (delta,) = engine.step()
    assert delta.usage is not None and delta.usage.pinned_tokens == 0


@pytest.mark.parametrize(
    ("device", "configured", "used"),
    [
        ("cpu", None, None),
        ("cuda", None, DEFAULT_MAX_STEP_S),
        ("cpu", 3.0, 3.0),
        ("cuda", 3.0, 3.0),
    ],
)
def test_the_time_of_a_step_is_bounded_where_it_is_configured_and_on_gpus(
    device: str, configured: float | None, used: float | None
) -> None:
    config = EngineConfig(
        model="m",
        page_size=PAGE,
        max_num_seqs=3,
        max_num_batched_tokens=40,
        max_step_s=configured,
    )
    budget = Engine(config, described(device=device)).scheduler._step_budget
    assert (None if budget is None else budget._max_step_s) == used


@pytest.mark.parametrize(("configured", "used"), [(None, 800), (800, 800), (90, 90), (801, None)])
def test_the_context_is_configured_up_to_the_models(
    configured: int | None, used: int | None
) -> None:
    config = EngineConfig(
        model="memory",
        page_size=PAGE,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=configured,
    )
    executor = MemoryExecutor(PAGE, 0, 0, 200)
    if used is None:
        message = "must be at most 800, the context of memory; got 801"
        with pytest.raises(ConfigError, match=message) as caught:
            Engine(config, executor)
        assert caught.value.field == "max_model_len"
    else:
        assert Engine(config, executor).info.max_model_len == used


def test_a_budget_without_room_for_one_sequence_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="kv_memory_bytes"):
        make_engine(budget=6)


@pytest.mark.parametrize(("recent", "sink"), [(0, 0), (1, 0), (2, 1)])
def test_a_sequence_pauses_at_the_end_of_its_lease_and_continues_when_it_grows(
    recent: int, sink: int
) -> None:
    engine, _ = make_engine(recent=recent, sink=sink)
    params = SamplingParams(temperature=0.0, max_tokens=190, ignore_eos=True)
    engine.add(request("r", [5, 6, 7], params=params, lease=LeaseTerms("l", 1, 4, 1, 12)))
    tokens: list[int] = []
    for pages in (1, 2, 3, 12):
        engine.extend(LeaseTerms("l", 1, 4, pages, 12))
        while engine.has_work and not engine.stalled:
            tokens += tokens_of(engine.step())
            engine.check_integrity()
            assert engine.scheduler.cache.sealed.used <= pages
        if pages < 12:
            # The last sampled token has not been written yet.
            assert 3 + len(tokens) == engine.geometry.tokens_within(pages) + 1
    assert tokens == expected_output([5, 6, 7], 190, ignore_eos=True)


def test_a_sequence_whose_lease_ends_within_its_cached_prefix_reads_its_own_pages() -> None:
    engine, _ = make_engine(seqs=1)
    prompt = [i * i % VOCAB for i in range(2 * PAGE + 1)]
    engine.add(request("cached", prompt[:-1], 1))
    engine.add(request("between", [3] * PAGE))
    run(engine)
    engine.add(request("r", prompt, lease=LeaseTerms("l", 1, 4, 1, 12)))
    while not engine.stalled:
        engine.step()
    engine.extend(LeaseTerms("l", 1, 4, 12, 12))
    assert tokens_of(run(engine)["r"]) == expected_output(prompt, 10)


def test_others_continue_while_a_sequence_is_paused_and_may_preempt_it() -> None:
    engine, _ = make_engine(budget=40, seqs=3)
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    engine.add(request("old", [4, 5], params=params))
    engine.add(request("paused", [6, 7], params=params, lease=LeaseTerms("l", 1, 1, 5, 13)))
    deltas = {"old": [], "paused": []}  # type: dict[str, list[int]]
    while not engine.stalled:
        for delta in engine.step():
            deltas[delta.request_id] += delta.token_ids
        engine.check_integrity()
    assert deltas["old"] == expected_output([4, 5], 200, ignore_eos=True)
    assert len(deltas["paused"]) == 6 * PAGE - 2
    engine.extend(LeaseTerms("l", 1, 1, 13, 13))
    for delta in run(engine)["paused"]:
        deltas["paused"] += delta.token_ids
    assert deltas["paused"] == expected_output([6, 7], 200, ignore_eos=True)


def run_until_stalled(engine: Engine) -> None:
    while not engine.stalled:
        engine.step()


def test_a_lease_that_grows_extends_its_own_sequences_alone() -> None:
    engine, _ = make_engine()
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    for name, lease_id in (("a", "l1"), ("b", "l10"), ("c", "l1")):
        lease = LeaseTerms(lease_id, 1, 1, 0, 12, sequences=2)
        engine.add(request(name, [5, 6], params=params, lease=lease))
    engine.add(request("free", [5, 6], 3))
    run_until_stalled(engine)
    engine.extend(LeaseTerms("l1", 1, 2, 4, 12, sequences=2))
    run_until_stalled(engine)
    written = {seq.request.request_id: seq.num_computed for seq in engine.scheduler.running}
    within = engine.geometry.tokens_within
    assert written == {"a": within(2), "b": within(0), "c": within(2)}


def test_a_deadline_makes_room_for_a_sequence_that_waits_behind_paused_ones() -> None:
    now = [0.0]
    executor = MemoryExecutor(PAGE, 0, 0, 200)
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=1, max_num_batched_tokens=16)
    engine = Engine(config, executor, clock=lambda: now[0])
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    lease = LeaseTerms("l", 1, 1, 0, 6)
    engine.add(request("paused", [5, 6], params=params, lease=lease, timeout_s=9.0))
    engine.add(request("waits", [7, 8], 3))
    while not engine.stalled:
        engine.step()
    now[0] = 9.0
    ended, token = engine.step()
    assert (ended.request_id, ended.finish_reason) == ("paused", EndReason.DEADLINE)
    assert token.request_id == "waits" and not engine.stalled


def test_logprobs_are_passed_on_also_if_they_are_zero() -> None:
    engine, executor = make_engine()
    execute = executor.execute

    def certain(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        result = execute(plan)
        tokens = [SampledToken(x.token_id, 0.0, [(x.token_id, 0.0)]) for x in result.tokens]
        return StepResult(plan.step, tokens, 0.5)

    engine.add(request("without", [3, 4], 1))
    assert run(engine)["without"][0].logprobs == ()
    executor.execute = certain  # type: ignore[method-assign]
    engine.add(request("with", [3, 4], 1))
    (delta,) = run(engine)["with"]
    (token,) = delta.token_ids
    assert delta.logprobs == (SampledLogprobs(0.0, ((token, 0.0),)),)
    assert engine.stats.rank_host_s == 0.5


def test_the_parts_of_a_step_are_timed_and_the_longest_wait_for_a_token() -> None:
    now = [0.0]
    executor = MemoryExecutor(PAGE, 0, 0, 200)
    execute = executor.execute

    def slow(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        now[0] += 4.0
        return StepResult(plan.step, execute(plan).tokens, host_s=1.0)

    executor.execute = slow  # type: ignore[method-assign]
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16)
    engine = Engine(config, executor, clock=lambda: now[0])
    engine.add(request("first", [5, 6], 3))
    engine.step()
    now[0] = 10.0  # nothing happens for a while
    engine.add(request("second", [7, 8], 3))
    engine.step()
    engine.step()
    assert engine.stats.take_step_times() == [
        StepTime(1.0, 3.0, None),  # first tokens have no predecessor
        StepTime(1.0, 3.0, 10.0),  # that of "first"
        StepTime(1.0, 3.0, 4.0),
    ]
    assert engine.stats.take_step_times() == []


def test_a_step_in_flight_is_timed_from_the_result_of_the_one_before() -> None:
    executor = TickingExecutor(PAGE, 0, 0, 200)
    executor.max_in_flight = 2
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16)
    engine = Engine(config, executor, lambda: executor.now_s)
    engine.add(request("r", [5, 6], params=SamplingParams(max_tokens=4, ignore_eos=True)))
    run(engine)
    times = engine.stats.take_step_times()
    assert [x.device_s for x in times] == pytest.approx([executor.step_s] * 4)
    assert [x.host_s for x in times] == pytest.approx([0.0] * 4)


def test_the_longest_wait_is_that_of_a_sequence_that_was_paused() -> None:
    now = [0.0]
    executor = MemoryExecutor(PAGE, 0, 0, 200)
    execute = executor.execute

    def slow(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        now[0] += 1.0
        return execute(plan)

    executor.execute = slow  # type: ignore[method-assign]
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=2, max_num_batched_tokens=16)
    engine = Engine(config, executor, clock=lambda: now[0])
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    lease = LeaseTerms("l", 1, 1, 0, 12)
    engine.add(request("paused", [5, 6], params=params, lease=lease))
    engine.add(request("other", [7, 8], params=params))
    last_s: dict[str, float] = {}
    while last_s.get("paused", 0.0) >= now[0] - 3.0:
        last_s |= {delta.request_id: now[0] for delta in engine.step()}
    engine.stats.take_step_times()
    engine.extend(LeaseTerms("l", 1, 1, 12, 12))
    assert {delta.request_id for delta in engine.step()} == {"paused", "other"}
    assert [x.token_gap_s for x in engine.stats.take_step_times()] == [now[0] - last_s["paused"]]


def test_loads_name_the_oldest_sequences_and_count_tokens_by_phase() -> None:
    now = [0.0]
    executor = MemoryExecutor(PAGE, 0, 0, 400)
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=2, max_num_batched_tokens=4)
    engine = Engine(config, executor, clock=lambda: now[0])
    for number in range(OLDEST + 2):
        engine.add(request(f"r{number}", list(range(10)), 3))
    now[0] = 7.0
    engine.step()
    loads = engine.loads()
    assert (loads.prefill_tokens_total, loads.decode_tokens_total) == (4, 0)
    assert loads.prefill_remaining_tokens == 10 * (OLDEST + 2) - 4
    assert len(loads.oldest) == OLDEST
    assert loads.oldest[0] == SequenceLoad("", 7.0, 10, 4, 0, 10)
    assert loads.oldest[0].age_s == 7.0
    run(engine)
    done = engine.loads()
    assert (done.oldest, done.prefill_remaining_tokens) == ((), 0)
    assert done.decode_tokens_total == 2 * (OLDEST + 2), "two of three tokens are computed"


def test_a_step_has_an_age_only_while_it_runs() -> None:
    engine, executor = make_engine()
    execute, seen = executor.execute, []

    def watch(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        seen.append(engine.step_start_s)
        return execute(plan, masks)

    executor.execute = watch  # type: ignore[method-assign]
    engine.add(request("r", [3, 4], 1))
    assert engine.step_start_s is None
    engine.step()
    assert seen[0] is not None and engine.step_start_s is None
    engine.step()  # nothing to do
    assert engine.step_start_s is None


def test_a_paused_sequence_still_has_its_deadline() -> None:
    now = [0.0]
    executor = MemoryExecutor(PAGE, 0, 0, 200)
    config = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16)
    engine = Engine(config, executor, clock=lambda: now[0])
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    lease = LeaseTerms("l", 1, 1, 0, 6)
    engine.add(request("r", [5, 6], params=params, lease=lease, timeout_s=9.0))
    while not engine.stalled:
        engine.step()
    now[0] = 4.0
    assert engine.deadline_s() == 5.0
    now[0] = 9.5
    assert engine.deadline_s() == 0.0
    (delta,) = engine.step()
    assert delta.finish_reason is EndReason.DEADLINE
    assert not engine.has_work and not engine.stalled


def test_pages_that_two_sequences_seal_in_the_same_step_are_stored_once() -> None:
    engine, executor = make_engine(tokens=256)
    prompt = [int(i) % VOCAB for i in range(6 * PAGE)]
    for name in "ab":
        engine.add(request(name, prompt, 3))
    first = engine.step()
    assert engine.scheduler.cache.sealed.used == executor.sealed_pages == 6
    rest = run(engine)
    for delta in first:
        output = tokens_of([delta, *rest[delta.request_id]])
        assert output == expected_output(prompt, 3)


def test_cached_block_ends_are_reported_when_they_change() -> None:
    engine, _ = make_engine(budget=64, tokens=64)
    prompt = [int(i) % VOCAB for i in range(2 * BLOCK_PAGES * PAGE + 5)]
    engine.add(request("a", prompt, 2))
    run(engine)
    expected = PageDigests(PAGE, "").upto(np.array(prompt, np.int32), 2 * BLOCK_PAGES)
    ends = expected[BLOCK_PAGES - 1 :: BLOCK_PAGES]
    assert engine.scheduler.cache.take_changes() == dict.fromkeys(ends, True)
    assert engine.scheduler.cache.take_changes() == {}
    # Another prompt takes the free pages and a few more: the end is evicted first.
    free = engine.loads().pool.sealed.free
    engine.add(request("b", [7] * ((free + 2) * PAGE + 1), 1))
    run(engine)
    changes = engine.scheduler.cache.take_changes()
    assert changes[ends[1]] is False and ends[0] not in changes
    engine.add(request("c", [8] * (free + 9) * PAGE, 1))
    run(engine)
    assert engine.scheduler.cache.take_changes()[ends[0]] is False


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_preempted_sequence_stays_within_its_grammar(in_flight: int) -> None:
    def run(*, preempted: bool) -> tuple[list[int], int]:
        engine, _ = make_engine(in_flight=in_flight)
        bound = OutputConstraint(regex("[C-Q]{20}[a-f]{20}").text())
        engine.add(request("r", [3, 4, 5], 60, constraint=bound))
        tokens: list[int] = []
        while engine.has_work:
            for delta in engine.step():
                tokens += delta.token_ids
            if preempted and len(tokens) in (7, 25) and engine.scheduler.running:
                engine.scheduler.preempt_youngest()
        return tokens, engine.scheduler.preemptions_total

    undisturbed, _ = run(preempted=False)
    assert re.fullmatch("[C-Q]{20}[a-f]{20}", "".join(chr(65 + t) for t in undisturbed[:-1]))
    tokens, preemptions = run(preempted=True)
    assert tokens == undisturbed
    assert preemptions >= 2
