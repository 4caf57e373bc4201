"""An engine next to a model of it: what every sequence must output, cost and hold."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace

import numpy as np

from kvmesh.workers.blame import Blame
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import NOT_SOUND, PROGRESS_PERIOD_S, Engine
from kvmesh.workers.errors import PoolCapacityError
from kvmesh.workers.executor import MakeMasks
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.plan import PENDING, Chunk, StepPlan, StepResult
from kvmesh.workers.request import EndReason, EngineRequest, SequenceDelta
from kvmesh.workers.request_check import check_request
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import BLOCK_PAGES, PageGeometry, PageNeed
from tests.exercised import Exercised
from tests.workers.engine_calls import CONTEXT, PAGE, Abort, Call, Grow, Setup, Steps, Submit, Wait
from tests.workers.memory_executor import EOS, TP, expected_output, expected_scores
from tests.workers.tainted_executor import BAD, TaintedExecutor
from tests.workers.watched_cache import watch

STEP_S = 0.25
NAMES = "abcdefghij"


@dataclass(frozen=True, slots=True)
class Held:
    """What a sequence holds in a step.

    shares_pages: when the step was decided; fullest: pages of the rank that has most
    """

    wanted: Wanted
    seq: Sequence
    shares_pages: bool
    pages: PageNeed
    fullest: PageNeed

    @classmethod
    def of(cls, wanted: Wanted, seq: Sequence, chunk: Chunk) -> Held:
        begin, sealed = (seq.geometry.sealed_range(x) for x in (chunk.start, chunk.end))
        hot = [page for page in range(-(-chunk.end // PAGE)) if page not in begin]
        ranks = (Counter(map(seq.deal.rank_of, pages)) for pages in (hot, sealed))
        fullest = PageNeed(*(max(counts.values(), default=0) for counts in ranks))
        return cls(wanted, seq, seq.shares_pages, PageNeed(len(hot), len(sealed)), fullest)


@dataclass(slots=True, eq=False)
class Wanted:
    """A live sequence, and what is expected of it.

    output: of the model, resumed tokens included; emitted: of these, what has come
    scores: of the prompt, that have come, and those that the client had
    """

    request: EngineRequest
    prompt: list[int]
    output: list[int]
    emitted: list[int]
    arrived_s: float
    progress_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    cached_tokens: int = 0
    scores: list[float] = field(default_factory=list)
    score_pieces: int = 0
    tried: bool = False
    peak: PageNeed = field(default_factory=lambda: PageNeed(0, 0))
    peak_pages: PageNeed = field(default_factory=lambda: PageNeed(0, 0))

    @property
    def stopped(self) -> bool:
        """Whether its last token ends it."""
        if not self.output:
            return False
        params, last = self.request.params, self.output[-1]
        is_stop = last in params.stop_token_ids or (last == EOS and not params.ignore_eos)
        return is_stop and len(self.output) >= params.min_tokens


class EngineMachine:
    def __init__(self, setup: Setup, seen: Exercised) -> None:
        self.seen = seen
        self.now = 0.0
        self.live: dict[str, Wanted] = {}
        self.leases: dict[str, LeaseTerms] = {}  # current terms
        self.deadlines: dict[str, float] = {}  # of the last sequence of that id
        self.totals: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.blocks: set[bytes] = set()  # as reported
        self.decoding: list[Sequence] = []
        self.submitted: deque[list[Held]] = deque()
        self.steps = 0  # submitted so far
        kvp = setup.kvp
        geometry = PageGeometry(PAGE, setup.sink, setup.recent, 4, 1, ranks=TP * kvp, kvp=kvp)
        headroom = -(-setup.chunk // PAGE)
        hot = setup.rows * geometry.hot_per_sequence() + geometry.on_fullest(headroom)
        budget = 4 * hot + geometry.on_fullest(setup.sealed_pages)
        self.all_pages = replace(geometry, kvp=1)  # counts pages of all ranks
        self.executor = TaintedExecutor(
            PAGE, setup.sink, setup.recent, budget, CONTEXT, kvp=setup.kvp
        )
        self.executor.max_in_flight = setup.in_flight
        submit, execute = self.executor.submit, self.executor.execute

        def watched_submit(plan: StepPlan) -> None:
            self.check_plan(plan)
            submit(plan)

        def watched(plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
            self.note_computed()
            self.now += STEP_S
            return execute(plan, masks)

        self.executor.submit = watched_submit  # type: ignore[method-assign]
        self.executor.execute = watched  # type: ignore[method-assign]
        self.config = EngineConfig(
            model="memory",
            page_size=PAGE,
            max_num_seqs=setup.rows,
            max_num_batched_tokens=max(setup.chunk, setup.rows),
            max_hot_share=0.95,
            prefix_cache=setup.prefix_cache,
            tp=TP,
            kvp=kvp,
            max_pinned_share=setup.pinned_share,
            max_pinned_share_per_key=setup.pinned_share / 2,
        )
        self.engine = Engine(self.config, self.executor, lambda: self.now)
        self.scheduler = self.engine.scheduler
        schedule = self.scheduler.schedule

        def watched_schedule() -> StepPlan | None:
            self.decoding = [
                seq
                for seq in self.scheduler.running
                if seq.to_compute == 1 and not seq.paused and not seq.on_trial
            ]
            return schedule()

        self.scheduler.schedule = watched_schedule  # type: ignore[method-assign]
        watch(self.scheduler.cache, seen.add)

    # Calls

    def call(self, call: Call) -> None:
        match call:
            case Submit():
                self.submit(call)
                self.run(call.steps)
            case Steps(count=count):
                self.run(count)
            case Abort(index=index) if self.live:
                self.abort([*self.live][index % len(self.live)])
            case Grow(index=index, pages=pages) if growing := self.growing():
                self.grow(growing[index % len(growing)], pages)
            case Wait(seconds=seconds):
                self.now += seconds
        self.audit()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.engine.has_work or self.engine.awaits_result:
                self.step()

    def finish(self) -> None:
        """Everything ends once all leases have grown."""
        for terms in self.growing():
            self.grow(terms, terms.max_sealed_pages)
        self.run(2000)
        assert [*self.live] == [], "these do not end"
        assert not self.engine.has_work
        self.audit()
        if (left_s := self.engine.deadline_s()) is not None:
            self.now += left_s + 10
            self.engine.step()
            self.seen.add("pins that have expired")
        assert self.engine.deadline_s() is None
        assert self.engine.loads().pinned_pages == 0, "a pin has no end"
        self.audit()

    def submit(self, call: Submit) -> None:
        free = [name for name in NAMES if name not in self.live]
        prompts = call.prompts()[: len(free)]
        largest = self.engine.geometry.tokens_within(self.engine.info.capacity.sealed)
        room = largest - max(map(len, prompts), default=largest)
        if room < 1:
            return
        params = call.params(
            call.max_tokens if "too long" in call.kinds else min(call.max_tokens, room)
        )
        terms = None
        if "lease" in call.kinds:
            count = len(prompts)
            hot = self.engine.geometry.hot_per_sequence() * count
            terms = LeaseTerms(f"{free[0]} at {self.now}", 1, hot, count, 11 * count, 0, count)
            self.leases[terms.lease_id] = terms
        wanted = []
        for name, prompt in zip(free, prompts, strict=False):
            limit = min(params.max_tokens, CONTEXT - len(prompt))
            ends = params.ignore_eos, params.stop_token_ids, params.min_tokens
            output = expected_output(prompt, limit, *ends, params.top_k)
            resumed = 0
            if "resumed" in call.kinds and output:
                resumed = min(PAGE + 3, len(output) - 1)
            scored = 0
            if "resumed" in call.kinds and params.prompt_logprobs is not None:
                scored = len(prompt) - 1 if resumed else min(PAGE + 5, len(prompt) - 1)
            item = EngineRequest(
                name,
                np.array(prompt + output[:resumed], np.int32),
                params,
                terms,
                resumed,
                timeout_s=4.0 if "timeout" in call.kinds else None,
                cache_salt="salt" if "salt" in call.kinds else "",
                suspicion=2 if "suspect" in call.kinds else 0,
                scored_tokens=scored,
                pin=call.pin,
            )
            found = Wanted(item, prompt, output, output[:resumed], self.now, self.now)
            found.scores = expected_scores(prompt)[:scored]
            wanted.append(found)
        if all(map(self.accepted, wanted)):
            self.engine.add(*(x.request for x in wanted))
            for x in wanted:
                self.note_added(x)

    def accepted(self, wanted: Wanted) -> bool:
        total = min(len(wanted.prompt) + wanted.request.params.max_tokens, CONTEXT)
        geometry = self.engine.geometry
        sealed = geometry.on_fullest(len(geometry.sealed_range(total)))
        fits = sealed <= self.engine.info.capacity.sealed
        try:
            check_request(wanted.request, self.engine.info)
        except PoolCapacityError:
            self.seen.add("refusals")
            assert not fits
        else:
            assert fits
        return fits

    def note_added(self, wanted: Wanted) -> None:
        name, timeout_s = wanted.request.request_id, wanted.request.timeout_s
        old = self.deadlines.pop(name, 0.0)
        if timeout_s is not None:
            self.deadlines[name] = self.now + timeout_s
        if old > self.now and self.deadlines.get(name) != old:
            self.seen.add("reused ids with another deadline")
        self.live[name] = wanted
        self.totals["prompt"] += len(wanted.prompt)
        self.seen.add("resumed sequences", wanted.request.resumed_tokens > 0)

    def abort(self, name: str) -> None:
        computed = self.engine._live[name].num_computed
        self.seen.add("aborts in flight", self.engine._live[name].pending > 0)
        self.seen.add("aborts in mid-prefill", 0 < computed < len(self.live[name].prompt))
        delta = self.engine.abort(name)
        assert delta is not None
        self.check_end(delta, EndReason.ABORT, self.now)
        assert self.engine.abort(name) is None

    def growing(self) -> list[LeaseTerms]:
        live = {x.request.lease.lease_id for x in self.live.values() if x.request.lease}
        return [
            terms
            for name, terms in self.leases.items()
            if name in live and terms.sealed_pages < terms.max_sealed_pages
        ]

    def grow(self, terms: LeaseTerms, pages: int) -> None:
        pages = min(terms.sealed_pages + pages, terms.max_sealed_pages)
        self.leases[terms.lease_id] = replace(terms, sealed_pages=pages)
        self.engine.extend(self.leases[terms.lease_id])
        self.seen.add("growths")

    # What must hold

    def step(self) -> None:
        """One step, as the engine's thread takes it."""
        engine, running = self.engine, self.scheduler.running
        before_s, was_stalled, steps = self.now, engine.stalled, len(self.executor.plans)
        left_s = {
            name: x.arrived_s + x.request.timeout_s - before_s
            for name, x in self.live.items()
            if x.request.timeout_s is not None
        }
        if left_s:
            patience_s = engine.deadline_s()
            assert patience_s is not None and 0 <= patience_s <= max(0, min(left_s.values()))
        overdue = {name for name, seconds in left_s.items() if seconds <= 0}
        paused = [seq for seq in running if seq.paused]
        preemptions = {seq: seq.preemptions for seq in running}
        pending = {seq: seq.pending for seq in running}
        deltas = engine.step()
        steps = len(self.executor.plans) - steps
        assert overdue or not (was_stalled and steps), "it could have continued before"
        assert engine.stalled == (not steps and engine.has_work)
        assert engine.blame == Blame(), "between steps nobody knows"
        self.totals["steps"] += steps
        self.seen.add("pauses", sum(seq.paused and seq not in paused for seq in running))
        for delta in deltas:
            self.check_delta(delta, overdue, before_s)
        assert not overdue & self.live.keys(), "a deadline has passed"
        for seq in (seq for seq, count in preemptions.items() if seq.preemptions > count):
            self.seen.add("preemptions")
            self.seen.add("preemptions of sequences with scores", seq.num_scored > 0)
            self.seen.add("preemptions with a token in flight", pending[seq] > 0)
            self.totals["preemptions"] += 1
            stayed = [other for other in running if other.preemptions == preemptions.get(other)]
            assert all(x.arrived_s <= seq.arrived_s for x in stayed), "an older one was preempted"

    def check_plan(self, plan: StepPlan) -> None:
        """Between deciding and computing."""
        running = {seq.row: seq for seq in self.scheduler.running}
        chunks = {chunk.row: chunk for chunk in plan.chunks}
        assert 0 < plan.num_tokens <= self.config.limits("cpu").max_num_batched_tokens
        self.steps += 1
        assert plan.step == self.steps
        ending = any(seq.about_to_end for seq in self.scheduler.running)
        for seq in self.decoding:
            assert ending or seq.row is None or seq.row in chunks, "a sequence missed a step"
        aboard = [running[row] for row in chunks]
        on_trial = [seq.request.request_id for seq in aboard if seq.on_trial]
        assert len(on_trial) <= 1
        if on_trial:
            assert not self.submitted, "a step with a trial is computed alone"
        names = {seq.request.request_id for seq in aboard}
        earlier = {held.seq.request.request_id for step in self.submitted for held in step}
        blamed = self.engine.blame.aboard
        assert blamed is not None and names <= blamed <= names | earlier
        assert self.engine.blame.on_trial == (on_trial[0] if on_trial else None)
        self.seen.add("overlapping steps", len(self.submitted))
        for name in on_trial:
            self.live[name].tried = True
        self.submitted.append([])
        for seq in aboard:
            wanted, chunk = self.live[seq.request.request_id], chunks[seq.row or 0]
            held = Held.of(wanted, seq, chunk)
            self.submitted[-1].append(held)
            if seq.lease is not None:
                assert held.fullest.sealed <= seq.lease.sealed_pages // seq.lease.sequences
            self.seen.add("tokens computed before they are known", chunk.tokens == PENDING)
        for start in plan.row_starts:
            seq = running[start.row]
            waiting = [x for x in self.scheduler.waiting if x.arrived_s < seq.arrived_s]
            assert all(x.on_trial for x in waiting), "an older one still waits"
            assert start.prompt_tokens == len(self.live[seq.request.request_id].prompt)
            self.note_start(seq, chunks[start.row].start)
        self.seen.add("admissions", len(plan.row_starts))
        self.seen.add("pages sealed for two", len(plan.sealed.ids) - len({*plan.sealed.ids}))
        self.seen.add("trials", len(on_trial))

    def note_computed(self) -> None:
        """The oldest step is computed, after all before it were committed."""
        for held in self.submitted.popleft():
            wanted = held.wanted
            if self.engine._live.get(wanted.request.request_id) is not held.seq:
                self.seen.add("tokens beyond the end")
            elif held.seq.shares_pages != held.shares_pages:
                self.seen.add("faults while the next step was in flight")
            else:
                wanted.peak = wanted.peak.or_more(held.fullest)
                wanted.peak_pages = wanted.peak_pages.or_more(held.pages)

    def on_fullest(self, seq: Sequence) -> PageNeed:
        """What the sequence holds of each form on the rank where it holds most."""
        by_rank = [Counter(i % seq.deal.kvp for i in x.values()) for x in (seq.hot, seq.sealed)]
        return PageNeed(*(max(counts.values(), default=0) for counts in by_rank))

    def note_start(self, seq: Sequence, computed: int) -> None:
        wanted = self.live[seq.request.request_id]
        params = wanted.request.params
        if wanted.started_s is None:
            wanted.started_s = self.now
            wanted.cached_tokens = min(computed, len(wanted.prompt))
            self.totals["cached"] += wanted.cached_tokens
        neutral = replace(
            params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
        )
        within_output = computed > len(wanted.prompt)
        self.seen.add(
            "penalised outputs that are partly cached", neutral != params and within_output
        )
        if not seq.shares_pages:
            assert computed == 0
            self.seen.add("recomputations for another's fault", BAD not in wanted.prompt)

    def check_delta(self, delta: SequenceDelta, overdue: set[str], before_s: float) -> None:
        wanted = self.live[delta.request_id]
        if delta.progress is not None:
            self.check_progress(wanted, delta)
            return
        if delta.scores is not None:
            self.check_scores(wanted, delta)
            return
        if wanted.request.params.prompt_logprobs is not None and (
            delta.token_ids or delta.finish_reason is EndReason.LENGTH
        ):
            assert wanted.scores == expected_scores(wanted.prompt), "scores come before output"
            self.seen.add("prompts scored in several pieces", wanted.score_pieces > 1)
        if delta.token_ids:
            wanted.first_token_s = wanted.first_token_s or self.now
            wanted.emitted += delta.token_ids
            self.totals["completion"] += len(delta.token_ids)
            assert wanted.emitted == wanted.output[: len(wanted.emitted)]
            assert wanted.tried or not wanted.request.suspicion, "a suspect was not tried"
        if delta.request_id in overdue:
            self.seen.add("deadlines")
            self.check_end(delta, EndReason.DEADLINE, before_s)
        elif delta.finish_reason is EndReason.FAULT:
            self.seen.add("sequences at fault")
            assert BAD in wanted.prompt and delta.error in ("NaN", NOT_SOUND)
            self.check_end(delta, EndReason.FAULT, self.now)
        elif wanted.emitted != wanted.output:
            assert delta.finish_reason is None
        elif wanted.stopped:
            self.seen.add("outputs cut by stop tokens")
            assert delta.matched_stop_token == wanted.output[-1]
            self.check_end(delta, EndReason.STOP, self.now)
        else:
            assert delta.matched_stop_token is None
            self.check_end(delta, EndReason.LENGTH, self.now)

    def check_scores(self, wanted: Wanted, delta: SequenceDelta) -> None:
        scores = delta.scores
        assert scores is not None and not delta.token_ids and delta.finish_reason is None
        wanted.scores += np.frombuffer(scores.logprobs, np.float32).tolist()
        wanted.score_pieces += 1
        assert wanted.scores == expected_scores(wanted.prompt)[: len(wanted.scores)]

    def check_progress(self, wanted: Wanted, delta: SequenceDelta) -> None:
        progress = delta.progress
        assert progress is not None and not delta.token_ids and delta.finish_reason is None
        assert self.now - wanted.progress_s >= PROGRESS_PERIOD_S
        wanted.progress_s = self.now
        assert 0 < progress.computed_tokens < progress.total_tokens
        assert progress.total_tokens == len(wanted.prompt) + len(wanted.emitted)
        assert progress.cached_tokens == min(wanted.cached_tokens, progress.computed_tokens)

    def check_end(self, delta: SequenceDelta, reason: EndReason, now: float) -> None:
        wanted, usage = self.live.pop(delta.request_id), delta.usage
        assert delta.finish_reason is reason and usage is not None
        self.outcomes[reason.value] += 1
        assert usage.prompt_tokens == len(wanted.prompt)
        assert usage.completion_tokens == len(wanted.emitted)
        assert usage.cached_tokens == wanted.cached_tokens
        arrived_s, first_s = wanted.arrived_s, wanted.first_token_s
        started_s = now if wanted.started_s is None else wanted.started_s
        assert usage.queue_s == started_s - arrived_s
        assert usage.total_s == now - arrived_s
        assert usage.time_to_first_token_s == (None if first_s is None else first_s - arrived_s)
        assert usage.preemptions <= 1
        peak = PageNeed(usage.hot_pages, usage.sealed_pages)
        assert wanted.peak == peak
        all_pages = wanted.peak_pages
        assert usage.kv_bytes == TP * (4 * all_pages.hot + all_pages.sealed)
        self.check_pin(wanted, usage.pinned_tokens)
        reserved_bytes = usage.kv_bytes
        if wanted.request.lease is not None:
            terms = self.leases[wanted.request.lease.lease_id]
            per_rank = 4 * terms.hot_pages + terms.sealed_pages
            reserved_bytes = self.executor.num_ranks * per_rank // terms.sequences
        assert usage.reserved_bytes == reserved_bytes

    def check_pin(self, wanted: Wanted, tokens: int) -> None:
        """Either all full pages of the prompt stay, or none."""
        pin, pages = wanted.request.pin, len(wanted.prompt) // PAGE
        assert tokens in (0, pages * PAGE)
        if pin is None or not pin.keep_s:
            assert not tokens
        elif tokens:
            self.seen.add("pins")
            assert pages <= self.engine.info.max_pinned_pages
        elif wanted.first_token_s is not None and pages and self.config.prefix_cache:
            self.seen.add("pins beyond their bounds")

    def audit(self) -> None:
        self.engine.check_integrity()
        scheduler, loads = self.scheduler, self.engine.loads()
        cache, geometry = scheduler.cache, self.engine.geometry
        assert self.engine._live.keys() == self.live.keys()
        for line in (scheduler.waiting, scheduler.running):
            times = [seq.arrived_s for seq in line]
            assert times == sorted(times)
        for seq in scheduler.running:
            need = self.all_pages.need(seq.num_computed)
            assert PageNeed(len(seq.hot), len(seq.sealed)) == need
            assert self.on_fullest(seq).fits(geometry.need(seq.num_computed))
            self.seen.add("sequences on several ranks", geometry.kvp > 1 and need.sealed > 1)
            self.seen.add("sequences too short to know their deal", not seq._deal_is_known)
        for seq in scheduler.waiting:
            assert (seq.row, seq.num_computed, seq.hot, seq.sealed) == (None, 0, {}, {})
        for dealt, report in ((cache.hot, loads.pool.hot), (cache.sealed, loads.pool.sealed)):
            used = [sum(holders > 0 for holders in part._holders) for part in dealt.parts]
            arena = dealt.parts[used.index(max(used))]
            assert (report.total, report.used, report.cached, report.free) == (
                dealt.total,
                max(used),
                len(arena._cached),
                len(arena._free),
            )
        pinned = {digest for digest in cache.sealed.pinned if digest in cache}
        self.seen.add("pins that hold cached pages", bool(pinned))
        held = scheduler.pins.pages
        assert held.sealed == loads.pinned_pages
        assert held.sealed <= cache.sealed.total * geometry.kvp * self.config.max_pinned_share
        assert loads.running == len(scheduler.running)
        assert loads.running + loads.waiting == len(self.live)
        assert loads.outcomes_total == self.outcomes
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "preemptions", "steps"):
            total = self.totals[name.removesuffix("_tokens")]
            assert getattr(loads, f"{name}_total") == total, name
        self.check_blocks()

    def check_blocks(self) -> None:
        """The blocks that were reported are those that are cached."""
        for block, held in self.scheduler.cache.take_changes().items():
            (self.blocks.add if held else self.blocks.discard)(block)
        cache = self.scheduler.cache
        found = cache.hot.named.keys() | cache.sealed.named.keys()
        assert self.blocks <= found
        for seq in self.scheduler.running:
            full_pages = seq.num_computed // PAGE
            ends = seq.digests(full_pages)[BLOCK_PAGES - 1 : full_pages : BLOCK_PAGES]
            self.seen.add("blocks held", len(ends))
            if seq.is_findable:
                assert {*ends} & found <= self.blocks
