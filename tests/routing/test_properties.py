"""Random arrivals, cancellations, crashes, refusals and restarts: what must hold regardless.

Engines here are books of the sequences they run; everything else is the real router.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.events import Event, LeaseAdopted, LeaseGranted, LeaseReleased
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.ledger import Ledger
from kvmesh.cluster.routing.request import Granted, PlaceRequest, Queued, Refused
from kvmesh.cluster.routing.router import Changes, Router
from kvmesh.workers.request import EngineLoads, LeaseTerms
from kvmesh.workers.sizes import PageNeed
from tests.routing.groups import make_loads, make_spec

GROUPS = {"a": (40, 30), "b": (40, 60), "c": (24, 120)}  # hot and sealed pages


@dataclass
class Sequence:
    request: PlaceRequest
    output: int  # what it will emit in the end, unknown to the router
    emitted: int = 0
    covered: int = 0
    use_by: float = 0.0
    group: str = ""
    lease: LeaseTerms | None = None
    state: str = "queued"  # queued, granted, running, done, refused, cancelled


@dataclass
class Engine:
    epoch: int = 0
    up: bool = True
    running: dict[str, Sequence] = field(default_factory=dict)  # by lease id


class RouterMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.epoch = 0
        self.count = 0
        self.all: dict[str, Sequence] = {}
        self.engines = {name: Engine() for name in GROUPS}
        self.log: list[Event] = []
        self.on_its_way: dict[str, tuple[float, EngineLoads | None]] = {}
        self.start_router()

    # What happens

    @rule(
        target=sequences,
        prompt=st.integers(1, 1500),
        most=st.integers(1, 300),
        share=st.floats(0, 1),
        priority=st.integers(0, 2),
        timeout=st.one_of(st.none(), st.floats(1, 100)),
        tenant=st.sampled_from("xyz"),
        chain=st.integers(0, 3),
    )
    def arrive(
        self,
        prompt: int,
        most: int,
        share: float,
        priority: int,
        timeout: float | None,
        tenant: str,
        chain: int,
    ) -> str:
        self.count += 1
        request = PlaceRequest(
            f"r{self.count}",
            prompt,
            most,
            tenant=tenant,
            priority=priority,
            timeout_s=timeout,
            page_hashes=tuple(b"%d/%d" % (chain, page) for page in range(prompt // 16)),
        )
        self.all[request.request_id] = Sequence(request, max(1, round(share * most)))
        self.submit(request)
        return request.request_id

    @rule(name=sequences)
    def hand_to_engine(self, name: str) -> None:
        self.hand_over(self.all[name])

    @rule(name=sequences)
    def engine_refuses(self, name: str) -> None:
        seq = self.all[name]
        if seq.state == "granted":
            assert seq.lease is not None
            self.settle(self.router.release(seq.lease.lease_id, self.now))
            self.replace(seq, excluded=frozenset([seq.group]))

    @rule(name=sequences, tokens=st.integers(1, 100))
    def decode(self, name: str, tokens: int) -> None:
        self.advance(self.all[name], tokens)

    @rule(name=sequences)
    def cancel(self, name: str) -> None:
        seq = self.all[name]
        if seq.state == "queued":
            self.settle(self.router.cancel(name, self.now))
        elif seq.state in ("granted", "running"):
            self.end(seq, None)
        else:
            return
        seq.state = "cancelled"

    @rule(name=sequences)
    def release_again(self, name: str) -> None:
        seq = self.all[name]
        if seq.state in ("done", "cancelled") and seq.lease is not None:
            assert self.router.release(seq.lease.lease_id, self.now) == Changes()

    @rule(seconds=st.floats(0.01, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.settle(self.router.tick(self.now))
        self.drop_swept()

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def report(self, group: str) -> None:
        engine = self.engines[group]
        if engine.up:
            self.settle(self.router.report(group, self.loads(group), self.now)[1])
            self.drop_swept()

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def send_report(self, group: str) -> None:
        if self.engines[group].up:
            self.on_its_way[group] = (self.now, self.loads(group))

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def late_report_arrives(self, group: str) -> None:
        sent_at, loads = self.on_its_way.pop(group, (-1e9, None))
        if loads is not None and self.now - sent_at < self.router.config.grace_s:
            self.settle(self.router.report(group, loads, self.now)[1])
            self.drop_swept()

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def crash(self, group: str) -> None:
        engine = self.engines[group]
        if engine.up:
            engine.up = False
            engine.running.clear()
            lost = self.held_on(group)
            self.settle(self.router.group_down(group, self.now))
            for seq in lost:
                self.replace(seq)

    @rule(group=st.sampled_from(sorted(GROUPS)))
    def come_back(self, group: str) -> None:
        engine = self.engines[group]
        if not engine.up:
            engine.up = True
            engine.epoch += 1
            self.settle(self.router.group_up(self.spec(group), self.now))

    @rule()
    def restart_router(self) -> None:
        self.start_router()
        for seq in self.all.values():  # whoever waited for an answer asks again
            if seq.state in ("queued", "granted"):
                self.replace(seq)
        for group in GROUPS:
            self.report(group)

    # What must hold

    @invariant()
    def no_group_is_overcommitted(self) -> None:
        """Counted from the holders' side: what their leases entitle them to fits the pool."""
        for group, (hot_pages, sealed_pages) in GROUPS.items():
            hot = sealed = 0
            pages: set[bytes] = set()
            for seq in self.held_on(group):
                assert seq.lease is not None
                own = make_spec().geometry.sealed_range(seq.request.prompt_tokens)
                shared = seq.request.page_hashes[own.start : own.stop // 4 * 4]
                hot += seq.lease.hot_pages
                sealed += seq.lease.sealed_pages - len(shared)
                pages.update(shared)
            assert hot <= hot_pages
            assert sealed + len(pages) <= sealed_pages
        self.router.ledger.check_integrity()

    @invariant()
    def every_request_is_where_it_is_thought_to_be(self) -> None:
        leases = self.router.ledger.leases
        heard = {
            name for name, x in self.router.ledger.accounts.items() if x.reported_at is not None
        }
        for seq in self.all.values():
            holds = seq.state == "granted" or (seq.state == "running" and seq.group in heard)
            if holds:
                assert seq.lease is not None
                assert leases[seq.lease.lease_id].group == seq.group
        assert self.router.queue_depth == sum(x.state == "queued" for x in self.all.values())

    @invariant()
    def leases_are_released_once(self) -> None:
        begun = Counter(
            event.lease.lease_id
            for event in self.log
            if isinstance(event, LeaseGranted | LeaseAdopted)
        )
        ended = Counter(e.lease_id for e in self.log if isinstance(e, LeaseReleased))
        live = Counter(self.router.ledger.leases.keys())
        assert begun == ended + live

    @invariant()
    def the_log_replays(self) -> None:
        assert Ledger.replay(self.log, self.epoch).state() == self.router.ledger.state()

    def teardown(self) -> None:
        """Left alone, everything that waits or runs comes to its end."""
        for group in GROUPS:
            self.come_back(group)
        for _ in range(1000):
            self.now += 1.0
            for group in GROUPS:
                self.report(group)
            self.settle(self.router.tick(self.now))
            for name in list(self.all):
                self.hand_over(self.all[name])
                self.advance(self.all[name], 400)
            self.no_group_is_overcommitted()
            if all(x.state in ("done", "refused", "cancelled") for x in self.all.values()):
                break
        states = Counter(seq.state for seq in self.all.values())
        assert not states.keys() & {"queued", "granted", "running"}, states
        assert not self.router.ledger.leases
        for account in self.router.ledger.accounts.values():
            assert account.used == PageNeed(0, 0)
            assert not account.shared

    # Within

    def loads(self, group: str) -> EngineLoads:
        engine = self.engines[group]
        leases = [seq.lease for seq in engine.running.values() if seq.lease is not None]
        return make_loads(leases, epoch=str(engine.epoch))

    def spec(self, group: str) -> GroupSpec:
        hot, sealed = GROUPS[group]
        epoch = str(self.engines[group].epoch)
        return make_spec(group, hot=hot, sealed=sealed, epoch=epoch, max_sequences=5)

    def start_router(self) -> None:
        self.epoch += 1
        self.log.clear()
        self.on_its_way.clear()
        up = [group for group, engine in self.engines.items() if engine.up]
        config = RouterConfig(
            queue_limit=200,
            least_samples=2,
            lease_quantile=0.5,
            long_share=0.0,
            block_pages=4,
            rebuild_timeout_s=1e9,
        )
        self.router = Router(
            config, self.epoch, self.now, expected_groups=up, on_event=self.log.append
        )
        for group in up:
            self.settle(self.router.group_up(self.spec(group), self.now))
        for group in GROUPS.keys() - up:  # known from the configuration, but not there yet
            self.router.group_up(self.spec(group), self.now)
            self.router.group_down(group, self.now)
        if self.epoch == 1:
            for group in GROUPS:
                self.report(group)

    def submit(self, request: PlaceRequest) -> None:
        decision, changes = self.router.submit(request, self.now)
        self.settle(changes)
        if not isinstance(decision, Queued):
            self.settle(Changes((decision,)))

    def replace(self, seq: Sequence, excluded: frozenset[str] = frozenset()) -> None:
        old = seq.request
        seq.state, seq.lease, seq.group = "queued", None, ""
        left = old.max_tokens - seq.emitted
        seq.output -= seq.emitted
        seq.request = PlaceRequest(
            old.request_id,
            old.prompt_tokens + seq.emitted,
            left,
            tenant=old.tenant,
            priority=old.priority,
            page_hashes=old.page_hashes,
            excluded_groups=excluded,
            resumed=seq.emitted > 0,
        )
        seq.emitted = 0
        self.submit(seq.request)

    def settle(self, changes: Changes) -> None:
        for outcome in changes.outcomes:
            seq = self.all[outcome.request_id]
            assert seq.state == "queued"
            match outcome:
                case Granted(placement=placement):
                    seq.state = "granted"
                    seq.group, seq.lease = placement.group, placement.lease
                    seq.covered = placement.leased_output_tokens
                    seq.use_by = placement.expires_at
                    assert self.engines[seq.group].up
                case Refused():
                    seq.state = "refused"

    def hand_over(self, seq: Sequence) -> None:
        if seq.state != "granted":
            return
        assert seq.lease is not None
        if self.now > seq.use_by:
            self.settle(self.router.release(seq.lease.lease_id, self.now))
            self.replace(seq)
            return
        seq.state = "running"
        self.engines[seq.group].running[seq.lease.lease_id] = seq
        self.settle(self.router.begun(seq.lease.lease_id, self.now))

    def advance(self, seq: Sequence, tokens: int) -> None:
        if seq.state != "running":
            return
        assert seq.lease is not None
        target = min(seq.emitted + tokens, seq.output)
        if target > seq.covered:
            growth = self.router.grow(seq.lease.lease_id, seq.request, target, self.now)
            if growth is not None:
                seq.covered, seq.lease = growth.output_tokens, growth.lease
        seq.emitted = min(target, seq.covered)
        if seq.emitted >= seq.output:
            self.end(seq, seq.emitted)
            seq.state = "done"

    def end(self, seq: Sequence, output: int | None) -> None:
        assert seq.lease is not None
        self.engines[seq.group].running.pop(seq.lease.lease_id, None)
        self.settle(self.router.release(seq.lease.lease_id, self.now, output))

    def held_on(self, group: str) -> list[Sequence]:
        states = ("granted", "running")
        return [x for x in self.all.values() if x.group == group and x.state in states]

    def drop_swept(self) -> None:
        """A grant that was not used in time is gone; its holder asks again."""
        for seq in self.all.values():
            if seq.state == "granted":
                assert seq.lease is not None
                if seq.lease.lease_id not in self.router.ledger.leases:
                    self.replace(seq)


@given(
    mosts=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_leases_that_grow_page_by_page_all_reach_their_most(
    mosts: list[int], order: Random
) -> None:
    """However growth is interleaved, and whoever comes in between, nobody is stuck for good."""
    ledger = Ledger(1)
    ledger.group_up(make_spec("g", hot=1000, sealed=20), 0.0)
    account = ledger.accounts["g"]
    waiting, growing = list(mosts), list[str]()
    while waiting or growing:
        moved = False
        if waiting and account.holds(PageNeed(1, 0), waiting[-1]):
            most = PageNeed(1, waiting.pop())
            lease = ledger.grant("g", PageNeed(1, 0), 0.0, request_id="r", most=most)
            growing.append(lease.lease_id)
            moved = True
        order.shuffle(growing)
        for lease_id in list(growing):
            lease = ledger.leases[lease_id]
            if lease.to_grow == 0:
                ledger.release(lease_id, 0.0)
                growing.remove(lease_id)
                moved = True
            elif ledger.grow(lease_id, PageNeed(1, lease.need.sealed + 1), 0.0):
                moved = True
        assert moved, "nobody can go on"
        ledger.check_integrity()


RouterMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestRouter = RouterMachine.TestCase
