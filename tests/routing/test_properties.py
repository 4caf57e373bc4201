"""Random arrivals, aborts, crashes, lost connections and restarts: what must hold regardless.

Engines here are books of the sequences they run. Between each of them and the router, two
ordered queues carry what they tell each other, and are read at random moments.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmesh.cluster.routing.accepted_formats import ANY_FORMAT, AcceptedFormats
from kvmesh.cluster.routing.audit import audit
from kvmesh.cluster.routing.config import RouterConfig, RouterTuning
from kvmesh.cluster.routing.errors import RequestAbortedError
from kvmesh.cluster.routing.leases import Leases
from kvmesh.cluster.routing.live import Lease
from kvmesh.cluster.routing.outcome import (
    Enqueued,
    Granted,
    Grown,
    Outcome,
    Placement,
    Refused,
    Withdrawn,
)
from kvmesh.cluster.routing.request import Past, PlaceRequest
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.status import router_status
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseTerms, LeaseWant
from kvmesh.workers.loads import ArenaLoads, EngineInfo, EngineLoads, PoolLoads
from kvmesh.workers.sizes import PageNeed
from tests.exercised import Exercised
from tests.routing.groups import FAST, grant, make_account, make_info, only

GROUPS = {"a": (40, 30), "b": (40, 60), "c": (24, 120)}  # hot and sealed pages
BLOCK_PAGES = 4
GEOMETRY = make_info().geometry
FINAL = ("done", "refused", "cancelled")
SEEN = Exercised(
    "router",
    {
        "grants": 250,
        "requests that wait": 200,
        "refusals": 10,
        "growths": 80,
        "withdrawals": 10,
        "lost leases": 2,
        "restarts with leases": 4,
        "aborts of running requests": 1,
        "cancelled while they wait": 1,
        "newer incarnations": 60,
        "leases given up before they arrived": 1,
        "audits": 200,
        "requests done": 100,
    },
)
LEDGER_SEEN = Exercised("ledger", {"grants": 300, "growths": 1000, "growths refused": 50})


@dataclass(eq=False)
class Job:
    """A request as its client and its ingress see it.

    output: what each sequence will emit in the end, unknown to the router
    state: queued, placed, running, or final
    connection: of the engine, during which it was placed there
    """

    request: PlaceRequest
    output: int
    state: str = "queued"
    placement: Placement | None = None
    connection: int = 0
    run: Run | None = None


@dataclass(eq=False)
class Run:
    """A lease's sequences on an engine; they are of one length.

    terms: as the engine knows them
    """

    job: Job
    request: PlaceRequest
    output: int
    terms: LeaseTerms
    emitted: int = 0
    wants: LeaseWant | None = None

    @property
    def tokens(self) -> int:
        return self.request.prompt_tokens + self.emitted

    @property
    def covered(self) -> int:
        """Tokens that each sequence may reach."""
        return GEOMETRY.tokens_within(self.terms.sealed_pages // self.terms.sequences)


@dataclass(eq=False)
class BookEngine:
    """strayed: it got a lease that the ledger no longer counted; until it runs nothing"""

    name: str
    epoch: int = 0
    up: bool = True
    connected: bool = True
    connections: int = 0
    strayed: bool = False
    runs: dict[str, Run] = field(default_factory=dict)  # by lease id
    withdrawn: set[str] = field(default_factory=set)
    to_router: deque[AccountUpdate | EngineLoads] = field(default_factory=deque)
    from_router: deque[Grown | Withdrawn] = field(default_factory=deque)

    @property
    def info(self) -> EngineInfo:
        hot, sealed = GROUPS[self.name]
        return make_info(
            hot=hot,
            sealed=sealed,
            epoch=f"{self.name}{self.epoch}",
            max_sequences=5,
            kv_format=self.name,
        )

    def tell(self, message: AccountUpdate | EngineLoads) -> None:
        if self.connected:
            self.to_router.append(message)

    def lose_connection(self) -> None:
        self.connected = False
        self.to_router.clear()
        self.from_router.clear()

    def take(self, job: Job, placement: Placement) -> bool:
        """The ingress submits; False if the engine refuses."""
        lease_id = placement.lease.lease_id
        if not self.up or placement.engine_epoch != self.info.epoch or lease_id in self.withdrawn:
            return False
        job.run = self.runs[lease_id] = Run(job, job.request, job.output, placement.lease)
        self.tell(AccountUpdate(arrived=(placement.lease,)))
        return True

    def decode(self, run: Run, tokens: int) -> None:
        lease_id = run.terms.lease_id
        target = min(run.emitted + tokens, run.output)
        reach = min(run.request.prompt_tokens + target, run.covered)
        emitted = max(reach - run.request.prompt_tokens, run.emitted)
        if emitted and not run.emitted:
            self.tell(AccountUpdate(first_tokens=(lease_id,)))
        run.emitted = emitted
        if emitted >= run.output:
            self.end(run, emitted)
        elif emitted < target and run.wants is None:
            prompt = run.request.prompt_tokens
            run.wants = LeaseWant(lease_id, prompt, prompt + target)
            self.tell(AccountUpdate(wants=(run.wants,)))

    def end(self, run: Run, output_tokens: int | None) -> None:
        del self.runs[run.terms.lease_id]
        self.tell(AccountUpdate(ended=(LeaseEnd(run.terms.lease_id, output_tokens),)))

    def report(self) -> None:
        """Loads of this moment; its sequences are as long as they have come."""
        hot = sealed = 0
        for run in self.runs.values():
            need = GEOMETRY.need(run.tokens)
            hot += need.hot * run.terms.sequences
            sealed += need.sealed * run.terms.sequences
        pool = PoolLoads(ArenaLoads(used=hot), ArenaLoads(used=sealed))
        self.tell(EngineLoads(pool=pool, leases=tuple(x.terms for x in self.runs.values())))


class RouterMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.epoch = 0
        self.all: dict[str, Job] = {}
        self.expired: set[str] = set()  # leases that had not arrived in time
        self.engines = {name: BookEngine(name) for name in GROUPS}
        self.start_router()
        for name in GROUPS:
            self.connect(name)

    # Clients and ingresses

    @rule(
        target=jobs,
        count=st.sampled_from([1, 4, 8]),
        chance=st.randoms(use_true_random=False),
        longest=st.sampled_from([100, 1500]),
    )
    def requests_arrive(self, count: int, chance: Random, longest: int) -> MultipleResults[str]:
        return multiple(*(self.arrive(chance, longest) for _ in range(count)))

    @initialize(
        target=jobs,
        count=st.integers(0, 12),
        chance=st.randoms(use_true_random=False),
        longest=st.sampled_from([100, 1500]),
    )
    def requests_are_there(self, count: int, chance: Random, longest: int) -> MultipleResults[str]:
        return multiple(*(self.arrive(chance, longest) for _ in range(count)))

    def arrive(self, chance: Random, longest: int) -> str:
        prompt, max_tokens = chance.randint(1, longest), chance.randint(1, 300)
        chain = chance.randrange(4)
        request = PlaceRequest(
            f"r{len(self.all)}",
            prompt,
            max_tokens,
            tenant=chance.choice("xyz"),
            priority=chance.randrange(3),
            timeout_s=chance.choice([None, None, chance.uniform(1, 100)]),
            page_hashes=tuple(b"%d/%d" % (chain, page) for page in range(prompt // 16)),
            sequences=chance.choice([1, 1, 1, 2]),
        )
        output = chance.randint(1, max_tokens)
        job = self.all[request.request_id] = Job(request, output)
        self.place(job)
        return request.request_id

    @rule(name=jobs)
    def ingress_submits(self, name: str) -> None:
        self.submit(self.all[name])

    @rule(name=jobs)
    def engine_refuses(self, name: str) -> None:
        job = self.all[name]
        if job.state == "placed":
            placement = self.give_back(job)
            self.place_again(job, accepts=only(*GROUPS.keys() - {placement.group}))

    @rule(name=jobs)
    def client_cancels(self, name: str) -> None:
        job = self.all[name]
        if job.state == "queued":
            SEEN.add("cancelled while they wait")
            job.state = "cancelled"
            self.settle(self.router.cancel([name], self.now))
        elif job.state == "placed":
            job.state = "cancelled"
            self.give_back(job)
        elif job.state == "running" and job.run is not None:
            job.state = "cancelled"
            self.engine_of(job).end(job.run, None)

    @rule(name=jobs)
    def client_aborts(self, name: str) -> None:
        job = next((x for x in self.all.values() if x.state == "running"), self.all[name])
        name = job.request.request_id
        SEEN.add("aborts of running requests", job.state == "running")
        known = self.router.abort(name, self.now)
        if known and job.state not in FINAL:
            job.state = "cancelled"
        self.settle(known)

    @rule(name=jobs)
    def newer_incarnation_comes(self, name: str) -> None:
        if self.all[name].state not in FINAL:
            self.place_again(self.all[name])

    @rule(name=jobs)
    def ingress_releases_again(self, name: str) -> None:
        job = self.all[name]
        if job.state in ("done", "cancelled") and job.placement is not None:
            self.settle(self.router.release(job.placement.lease.lease_id, self.now))

    # Engines

    @rule(name=jobs, tokens=st.integers(1, 100))
    def engine_decodes(self, name: str, tokens: int) -> None:
        job = self.all[name]
        if job.state == "running":
            self.decode(job, tokens)

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def engine_reports(self, group: str) -> None:
        self.engines[group].report()

    @rule(group=st.sampled_from(sorted(GROUPS)), count=st.integers(1, 5))
    def router_hears(self, group: str, count: int) -> None:
        self.deliver_to_router(self.engines[group], count)

    @rule(group=st.sampled_from(sorted(GROUPS)), count=st.integers(1, 5))
    def engine_hears(self, group: str, count: int) -> None:
        self.deliver_to_engine(self.engines[group], count)

    @rule(group=st.sampled_from(sorted(GROUPS)), ingress_first=st.booleans())
    def engine_crashes(self, group: str, ingress_first: bool) -> None:
        engine = self.engines[group]
        if not engine.up:
            return
        SEEN.add("lost leases", len(engine.runs))
        lost = [run.job for run in engine.runs.values() if run.job.run is run]
        engine.up = False
        engine.runs.clear()
        engine.withdrawn.clear()
        engine.lose_connection()
        if ingress_first:
            self.lost_on(engine, lost)
        self.settle(self.router.group_down(group, self.now))
        if not ingress_first:
            self.lost_on(engine, lost)

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def engine_comes_back(self, group: str) -> None:
        engine = self.engines[group]
        if not engine.up:
            engine.up = True
            engine.strayed = False
            engine.epoch += 1
            self.connect(group)

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def connection_breaks(self, group: str) -> None:
        if self.engines[group].connected:
            self.engines[group].lose_connection()
            self.settle(self.router.group_down(group, self.now))

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def engine_connects_again(self, group: str) -> None:
        if self.engines[group].up and not self.engines[group].connected:
            self.connect(group)

    @rule(tokens=st.integers(1, 100))
    def all_continue(self, tokens: int) -> None:
        for job in list(self.all.values()):
            self.submit(job)
        for engine in self.engines.values():
            for run in list(engine.runs.values()):
                self.decode(run.job, tokens, run)
            self.deliver_to_router(engine, 4)
            self.deliver_to_engine(engine, 4)

    # The router

    @rule(seconds=st.floats(0.01, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        outcomes = self.router.tick(self.now)
        self.expired |= {x.lease_id for x in outcomes if isinstance(x, Withdrawn)}
        self.settle(outcomes)

    @precondition(lambda self: len(self.all) > 3)
    @rule()
    def router_restarts(self) -> None:
        SEEN.add("restarts with leases", bool(self.leases))
        for engine in self.engines.values():
            engine.lose_connection()
        self.start_router()
        for job in self.all.values():  # callers that waited for an answer ask again
            if job.state == "queued":
                self.place(job)

    # What must hold

    @invariant()
    def no_group_is_overcommitted(self) -> None:
        """Counted from the holders' side: what they are entitled to fits the pool."""
        for name, engine in self.engines.items():
            self.note_strays(engine)
            if engine.strayed:
                continue
            hot = sealed = 0
            pages: set[bytes] = set()
            for request, terms in self.entitled(engine):
                own = GEOMETRY.sealed_range(request.prompt_tokens)
                stop = own.stop // BLOCK_PAGES * BLOCK_PAGES
                shared = request.page_hashes[own.start : stop]
                hot += terms.hot_pages
                sealed += terms.sealed_pages - len(shared)
                pages.update(shared)
            assert hot <= GROUPS[name][0]
            assert sealed + len(pages) <= GROUPS[name][1]

    @invariant()
    def the_accounts_are_the_sums_of_their_leases(self) -> None:
        self.router.leases.check_integrity()

    @invariant()
    def leases_are_released_once(self) -> None:
        status = router_status(self.router, self.now)
        live = sum(not lease.adopted for lease in self.leases.values())
        assert status.granted_total == status.released_total + status.expired_total + live

    @invariant()
    def every_request_is_where_it_is_thought_to_be(self) -> None:
        status = router_status(self.router, self.now)
        assert status.queue_depth == sum(job.state == "queued" for job in self.all.values())
        self.the_queue_reads_as_it_stands()
        for engine in self.engines.values():
            if engine.connected and not engine.to_router:
                assert engine.runs.keys() <= self.leases.keys()
            elif not engine.connected:
                assert all(lease.group != engine.name for lease in self.leases.values())

    def the_queue_reads_as_it_stands(self) -> None:
        standings = list(self.router.admission.standings(self.now))
        assert [standing.position for standing in standings] == list(range(len(standings)))
        names = [standing.request_id for standing in standings]
        assert sorted(names) == sorted(x for x, job in self.all.items() if job.state == "queued")
        waiting = {live.request_id: live.rank[:2] for live in self.router.admission.queue}
        ranks = [waiting[name] for name in names]
        assert ranks == sorted(ranks)
        for standing in standings:
            assert standing.projected_start_s is None or standing.projected_start_s >= 0

    def teardown(self) -> None:
        """Left alone, all that waits or runs comes to its end."""
        for group in GROUPS:
            self.engine_comes_back(group)
            self.engine_connects_again(group)
        for _ in range(1000):
            self.now += 1.0
            self.settle(self.router.tick(self.now))
            for job in list(self.all.values()):
                self.submit(job)
            for engine in self.engines.values():
                for run in list(engine.runs.values()):
                    self.decode(run.job, 400, run)
                engine.report()
                self.deliver_to_engine(engine, 1000)
                self.deliver_to_router(engine, 1000)
            self.no_group_is_overcommitted()
            idle = not any(engine.runs for engine in self.engines.values())
            if idle and not self.leases and all(x.state in FINAL for x in self.all.values()):
                break
        assert not Counter(job.state for job in self.all.values() if job.state not in FINAL)
        status = router_status(self.router, self.now)
        assert (status.leases, status.live_requests, status.queue_depth) == (0, 0, 0)
        for use in self.router.fleet.tenants._uses.values():
            assert (use.active, use.leased_bytes) == (0, 0)
        for group in GROUPS:
            account = self.router.fleet.groups[group].account
            assert account is not None
            assert (account.used, account.reserve) == (PageNeed(0, 0), 0)

    # Within

    @property
    def leases(self) -> Leases:
        return self.router.leases

    def start_router(self) -> None:
        self.epoch += 1
        up = [name for name, engine in self.engines.items() if engine.up]
        tuning = RouterTuning(
            pace=FAST,
            min_samples=2,
            block_pages=BLOCK_PAGES,
        )
        config = RouterConfig(queue_limit=200, rebuild_timeout_s=1e9, tuning=tuning)
        self.router = Router(config, self.epoch, self.now, expected_groups=up)
        for prompt in (1 << power for power in range(11)):  # outputs seem short: leases must grow
            for _ in range(tuning.min_samples):
                self.router.fleet.lengths.learn("", prompt, 1)
        for name in GROUPS.keys() - up:  # known, but not there yet
            self.router.group_up(name, self.engines[name].info, (), self.now)
            self.router.group_down(name, self.now)

    def connect(self, group: str) -> None:
        """Says which leases the engine holds; sequences that waited for pages say so again."""
        engine = self.engines[group]
        engine.connected = True
        engine.connections += 1
        held = [run.terms for run in engine.runs.values()]
        outcomes = self.router.group_up(group, engine.info, held, self.now)
        wants = tuple(run.wants for run in engine.runs.values() if run.wants is not None)
        engine.tell(AccountUpdate(wants=wants))
        self.settle(outcomes)

    def place(self, job: Job) -> None:
        own, *others = self.router.place(job.request, self.now)
        if isinstance(own, Enqueued):
            SEEN.add("requests that wait")
            assert own.position in [
                standing.position
                for standing in self.router.admission.standings(self.now)
                if standing.request_id == own.request_id
            ]
        self.settle(others)
        job.state = "queued"
        self.settle([own])

    def place_again(
        self,
        job: Job,
        *,
        accepts: AcceptedFormats = ANY_FORMAT,
        lost_engines: frozenset[str] = frozenset(),
    ) -> None:
        """As a newer incarnation, with what it has emitted as part of the prompt."""
        SEEN.add("newer incarnations")
        emitted = job.run.emitted if job.run is not None else 0
        old = job.request
        job.output -= emitted
        job.request = replace(
            old,
            prompt_tokens=old.prompt_tokens + emitted,
            max_tokens=old.max_tokens - emitted,
            past=Past.RAN if emitted else max(old.past, Past.AGAIN),
            accepts=accepts,
            lost_engines=lost_engines,
        )
        job.state, job.run, job.placement = "superseded", None, None
        self.place(job)

    def submit(self, job: Job) -> None:
        if job.state != "placed" or job.placement is None:
            return
        engine, placement = self.engines[job.placement.group], job.placement
        if not engine.take(job, placement):
            lost = frozenset([placement.engine_epoch])
            self.give_back(job)
            self.place_again(job, lost_engines=lost if not engine.up else frozenset())
            return
        job.state = "running"
        reconnected = job.connection != engine.connections
        given_up = reconnected or placement.lease.lease_id in self.expired
        SEEN.add("leases given up before they arrived", given_up)
        engine.strayed |= given_up
        self.note_strays(engine)

    def note_strays(self, engine: BookEngine) -> None:
        """Look for leases that the ledger gave up before it heard of their arrival."""
        if not engine.runs:
            engine.strayed = False
        elif engine.connected:
            engine.strayed |= not engine.runs.keys() <= self.leases.keys()

    def give_back(self, job: Job) -> Placement:
        assert job.placement is not None
        self.settle(self.router.release(job.placement.lease.lease_id, self.now))
        return job.placement

    def decode(self, job: Job, tokens: int, run: Run | None = None) -> None:
        run = run or job.run
        assert run is not None
        engine = next(x for x in self.engines.values() if run in x.runs.values())
        engine.decode(run, tokens)
        if run.terms.lease_id not in engine.runs and job.run is run and job.state == "running":
            SEEN.add("requests done")
            job.state = "done"

    def engine_of(self, job: Job) -> BookEngine:
        assert job.placement is not None
        return self.engines[job.placement.group]

    def lost_on(self, engine: BookEngine, jobs: list[Job]) -> None:
        for job in jobs:
            if job.state == "running":
                self.place_again(job, lost_engines=frozenset([engine.info.epoch]))

    def settle(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case Granted(placement=placement):
                    SEEN.add("grants")
                    job, engine = self.all[placement.request_id], self.engines[placement.group]
                    assert job.state == "queued"
                    assert engine.connected
                    assert engine.info.epoch == placement.engine_epoch
                    assert engine.info.epoch not in job.request.lost_engines
                    assert not job.request.accepts.why_not(engine.info)
                    job.state, job.placement = "placed", placement
                    job.connection = engine.connections
                case Refused(error=error):
                    job = self.all[outcome.request_id]
                    if isinstance(error, RequestAbortedError):
                        assert job.state in ("superseded", "cancelled")
                    else:
                        SEEN.add("refusals")
                        assert job.state == "queued"
                        job.state = "refused"
                case Grown() | Withdrawn():
                    SEEN.add("growths" if isinstance(outcome, Grown) else "withdrawals")
                    engine = self.engines[outcome.group]
                    if engine.connected:  # the router hears of a broken connection later
                        engine.from_router.append(outcome)

    def deliver_to_router(self, engine: BookEngine, count: int) -> None:
        for _ in range(min(count, len(engine.to_router))):
            message = engine.to_router.popleft()
            if isinstance(message, EngineLoads):
                SEEN.add("audits")
                account = self.router.fleet.account(engine.name)
                assert account is not None and audit(account, message) == ()
            else:
                self.note_strays(engine)
                self.settle(self.router.account(engine.name, message, self.now))

    def deliver_to_engine(self, engine: BookEngine, count: int) -> None:
        for _ in range(min(count, len(engine.from_router))):
            message = engine.from_router.popleft()
            if isinstance(message, Grown):
                run = engine.runs.get(message.lease.lease_id)
                if run is not None:
                    assert PageNeed(0, run.terms.sealed_pages).fits(
                        PageNeed(0, message.lease.sealed_pages)
                    )
                    run.terms, run.wants = message.lease, None
            else:
                self.withdraw(engine, message.lease_id)

    def withdraw(self, engine: BookEngine, lease_id: str) -> None:
        engine.withdrawn.add(lease_id)
        run = engine.runs.get(lease_id)
        if run is None:
            engine.tell(AccountUpdate(ended=(LeaseEnd(lease_id),)))
            return
        engine.end(run, None)
        if run.job.run is run and run.job.state == "running":  # it had come too late
            self.place_again(run.job)

    def entitled(self, engine: BookEngine) -> list[tuple[PlaceRequest, LeaseTerms]]:
        """Who may hold pages of the engine, and how many: as the ledger says, or the engine."""
        held = {name: (run.request, run.terms) for name, run in engine.runs.items()}
        for lease in self.leases.values():
            if lease.group == engine.name and lease.request is not None:
                held[lease.lease_id] = (lease.request, lease.terms)
            elif lease.lease_id in held:
                held[lease.lease_id] = (held[lease.lease_id][0], lease.terms)
        return list(held.values())


@LEDGER_SEEN.required
@settings(deadline=None)
@given(
    maxima=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_leases_that_grow_page_by_page_all_reach_their_maximum(
    maxima: list[int], order: Random
) -> None:
    """However growth is interleaved, and whatever comes in between, no lease is stuck for good."""
    account = make_account(hot=1000, sealed=20)
    waiting, growing = list(maxima), list[Lease]()
    number = 0
    while waiting or growing:
        moved = False
        if waiting and account.holds(PageNeed(1, 0), waiting[-1]):
            max_sealed, number = waiting.pop(), number + 1
            growing.append(grant(account, PageNeed(1, 0), number=number, max_sealed=max_sealed))
            LEDGER_SEEN.add("grants")
            moved = True
        order.shuffle(growing)
        for lease in list(growing):
            if lease.to_grow == 0:
                account.release(lease)
                growing.remove(lease)
                moved = True
            elif account.grow(lease, lease.need.sealed + 1):
                LEDGER_SEEN.add("growths")
                moved = True
            else:
                LEDGER_SEEN.add("growths refused")
        assert moved, "no lease can continue"
        account.check_integrity()


@SEEN.required
def test_the_router_whatever_happens() -> None:
    """Not shrunk, which would take minutes: a failure prints its 60 steps as they were."""
    run_state_machine_as_test(
        RouterMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[x for x in settings().phases if x is not Phase.shrink],
        ),
    )
