"""The leader under any sequence of calls, with an engine whose thread takes turns when asked to."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import pytest
from hypothesis import given

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.engine_thread import Command, EngineNews
from kvmesh.workers.errors import (
    EngineDrainingError,
    InvalidFieldError,
    PoolCapacityError,
    WorkerDiedError,
)
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.lease import AccountUpdate, LeaseTerms
from kvmesh.workers.lease_book import AHEAD_TOKENS
from kvmesh.workers.request import EndReason, EngineRequest, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams
from tests.exercised import Exercised
from tests.scenarios import SEEDS, check, scenarios
from tests.workers.memory_executor import MemoryExecutor, expected_output
from tests.workers.test_engine import PAGE, request

CONFIG = EngineConfig(model="memory", page_size=PAGE, max_num_seqs=3, max_num_batched_tokens=16)
SEEN = Exercised(
    "leader",
    {
        "submissions": 450,
        "refusals for lack of pages": 150,
        "refused ids": 25,
        "aborts": 70,
        "lost clients": 30,
        "withdrawals of running leases": 60,
        "withdrawals of leases that never came": 40,
        "growths": 80,
        "leases nearly used up": 200,
        "sequences that end by themselves": 250,
        "failures with live sequences": 15,
        "failures without": 1,
        "drains": 6,
    },
)


class SteppedThread:
    """In place of EngineThread: commands wait until `turn`, which also takes a step."""

    def __init__(self, make: Callable[[], Engine], leader: EngineLeader) -> None:
        self.engine = make()
        self._leader = leader
        self._commands: list[Command] = []

    def start(self) -> None:
        self._leader.engine_started(self.engine)

    def put(self, command: Command) -> None:
        self._commands.append(command)

    def turn(self, *, report: bool) -> None:
        commands, self._commands = self._commands, []
        deltas = [delta for x in commands if (delta := x(self.engine)) is not None]
        deltas += self.engine.step()
        made = EngineNews.of(self.engine) if report else None
        self._leader.engine_output(deltas, made)


@dataclass(slots=True, eq=False)
class Live:
    """A sequence that has not ended. ending: a reason that may end it from now on"""

    item: EngineRequest
    client: int
    output: list[int]
    ending: set[EndReason]


class LeaderMachine:
    def __init__(self, in_flight: int) -> None:
        self.changes = 0
        executor = MemoryExecutor(PAGE, 0, 0, 60)
        executor.max_in_flight = in_flight
        self.leader = EngineLeader(CONFIG, executor, self.changed)
        self.thread = SteppedThread(self.leader._make_engine, self.leader)
        self.leader._thread = self.thread  # type: ignore[assignment]
        self.clients = [self.client(index) for index in range(3)]
        self.live: dict[str, Live] = {}
        self.emitted: dict[str, list[int]] = {}
        self.reported: Counter[str] = Counter()
        self.ended: dict[str, int | None] = {}
        self.expected_ends: dict[str, int | None] = {}
        self.outputs: dict[str, list[int | None]] = {}
        # Since they last grew: leases that have asked for pages, and sequences with new tokens.
        self.asked: set[str] = set()
        self.noted: set[str] = set()
        self.terms: dict[str, LeaseTerms] = {}  # current, of leases with live sequences
        self.names = itertools.count()
        self.draining: asyncio.Task[None] | None = None

    async def start(self) -> None:
        info = await self.leader.start()
        assert self.leader.account.info is info is self.thread.engine.info

    def changed(self) -> None:
        self.changes += 1

    def client(self, index: int) -> Callable[[list[SequenceDelta]], None]:
        def deliver(deltas: list[SequenceDelta]) -> None:
            assert deltas, "nothing to deliver"
            for delta in deltas:
                assert self.live[delta.request_id].client == index
                self.delivered(delta)

        return deliver

    def delivered(self, delta: SequenceDelta) -> None:
        name, live = delta.request_id, self.live[delta.request_id]
        self.emitted[name] += delta.token_ids
        assert self.emitted[name] == live.output[: len(self.emitted[name])]
        reason = delta.finish_reason
        if reason is None:
            self.noted.add(name)
            return
        if reason is EndReason.LENGTH:
            SEEN.add("sequences that end by themselves")
            assert self.emitted[name] == live.output
        else:
            assert reason in live.ending
        del self.live[name]
        if (lease := live.item.lease) is not None:
            # A stop string ends it at the client's end.
            by_itself = reason in (EndReason.LENGTH, EndReason.STOP)
            natural = len(self.emitted[name]) if by_itself else None
            outputs = self.outputs.setdefault(lease.lease_id, [])
            outputs.append(natural)
            if len(outputs) == lease.sequences:
                known = [x for x in outputs if x is not None]
                learned = max(known) if None not in outputs else 0
                self.expected_ends[lease.lease_id] = learned or None
                del self.terms[lease.lease_id]
                assert self.leader._account is not None
                held = [terms.lease_id for terms in self.leader._account.book.leases]
                assert lease.lease_id not in held, "the account must know before the client"

    # Calls

    async def call(self, what: str, *numbers: int) -> None:
        if self.leader.failed is not None:
            return
        self.changes_before = self.changes
        getattr(self, what)(*numbers)
        await asyncio.sleep(0)
        self.audit()

    def submit(self, client: int, sequences: int, tokens: int, pages: int) -> None:
        prompt, lease_id = [tokens % 40, 5], f"l{next(self.names)}"
        params = SamplingParams(temperature=0.0, max_tokens=1 + tokens % 40, ignore_eos=True)
        terms, sequences = None, 1 + sequences % 2
        if pages % 4:
            hot = self.thread.engine.geometry.hot_per_sequence() * sequences
            sealed = sequences * (pages % 4 - 1) + 1
            terms = LeaseTerms(lease_id, 1, hot, sealed, sealed + 5 * sequences, 0, sequences)
        else:
            sequences = 1
        items = [
            request(f"{lease_id}.{i}", prompt, params=params, lease=terms) for i in range(sequences)
        ]
        book = self.leader.account.book
        covered = sum(x.sealed_pages for x in book.leases), sum(x.hot_pages for x in book.leases)
        capacity = self.leader.account.info.capacity
        fits = terms is None or (
            covered[0] + terms.sealed_pages <= capacity.sealed
            and covered[1] + terms.hot_pages <= capacity.hot
        )
        submit = partial(self.leader.submit, items, self.clients[client % 3])
        if self.draining is not None:
            with pytest.raises(EngineDrainingError):
                submit()
        elif not fits:
            SEEN.add("refusals for lack of pages")
            with pytest.raises(PoolCapacityError):
                submit()
        else:
            SEEN.add("submissions")
            submit()
            assert not self.leader.account.loads_current
            assert terms is None or self.changes > self.changes_before
            for item in items:
                output = expected_output(prompt, params.max_tokens, ignore_eos=True)
                self.live[item.request_id] = Live(item, client % 3, output, set())
                self.emitted[item.request_id] = []
            if terms is not None:
                self.terms[lease_id] = terms

    def submit_again(self, index: int, other: int) -> None:
        for name in self.pick(index):
            if self.draining is None:
                SEEN.add("refused ids")
                fresh = request(f"fresh {other}", [3])
                with pytest.raises(InvalidFieldError, match="request_id"):
                    self.leader.submit([fresh, self.live[name].item], self.clients[0])

    def abort(self, index: int) -> None:
        for name in self.pick(index):
            SEEN.add("aborts")
            self.live[name].ending.add(EndReason.STOP)
            self.leader.abort([name, "unknown"], EndReason.STOP)

    def lose_client(self, client: int) -> None:
        names = [name for name, live in self.live.items() if live.client == client % 3]
        SEEN.add("lost clients", bool(names))
        self.leader.disconnect(self.clients[client % 3])
        for name in names:
            self.live[name].ending.add(EndReason.ABORT)

    def withdraw(self, index: int) -> None:
        for name in [*self.terms][index % max(1, len(self.terms)) :][:1]:
            SEEN.add("withdrawals of running leases")
            self.leader.withdraw(name)
            for live in self.live.values():
                if live.item.lease is not None and live.item.lease.lease_id == name:
                    live.ending.add(EndReason.ABORT)

    def withdraw_unknown(self) -> None:
        SEEN.add("withdrawals of leases that never came")
        name = f"unknown {next(self.names)}"
        self.leader.withdraw(name)
        self.expected_ends[name] = None
        assert self.changes > self.changes_before

    def grow(self, index: int, pages: int) -> None:
        for name in [*self.terms][index % max(1, len(self.terms)) :][:1]:
            SEEN.add("growths")
            self.extend(name, pages % 3)

    def extend(self, name: str, pages: int) -> None:
        terms = self.terms[name]
        more = min(terms.sealed_pages + pages, terms.max_sealed_pages)
        self.terms[name] = replace(terms, sealed_pages=more)
        self.leader.extend(self.terms[name])
        self.asked.discard(name)
        self.noted -= {f"{name}.{index}" for index in range(terms.sequences)}

    def grow_ended(self) -> None:
        for name in self.expected_ends:
            self.leader.extend(LeaseTerms(name, 1, 1, 9, 9))

    def turns(self, count: int, report: int) -> None:
        for _ in range(1 + count % 12):
            live = len(self.live)
            self.thread.turn(report=bool(report % 2))
            if report % 2:
                loads = self.leader.account.loads
                assert loads == replace(
                    self.thread.engine.loads(), leases=self.leader.account.book.leases
                )
                assert self.leader.account.loads_current
                assert self.changes > self.changes_before
            elif len(self.live) < live:
                assert not self.leader.account.loads_current
                assert self.changes > self.changes_before

    def drain(self) -> None:
        if self.draining is None:
            SEEN.add("drains")
            self.draining = asyncio.ensure_future(self.leader.drain())

    def take(self) -> None:
        self.note(self.leader.account.book.take_update())

    def fail(self) -> None:
        SEEN.add("failures with live sequences" if self.live else "failures without")
        for live in self.live.values():
            live.ending = {EndReason.ERROR}
        error = WorkerDiedError("a rank was killed")
        self.leader.engine_failed(error)
        assert self.leader.failed is error and not self.live
        assert self.changes > self.changes_before
        with pytest.raises(WorkerDiedError, match="a rank was killed"):
            self.leader.submit([request("late", [3])], self.clients[0])

    def pick(self, index: int) -> list[str]:
        return [[*self.live][index % len(self.live)]] if self.live else []

    # What must hold

    def audit(self) -> None:
        assert self.leader._idle.is_set() == (not self.live)
        assert self.leader._live.keys() == self.live.keys()
        assert self.draining is None or self.draining.done() == (not self.live)
        if self.leader.failed is not None:
            return
        assert {x.lease_id: x for x in self.leader.account.book.leases} == self.terms
        update = self.leader.account.book.take_update()
        if update:
            assert self.changes > self.changes_before, "the router is not informed"
        self.note(update)
        assert self.ended == self.expected_ends
        self.audit_wants()

    def audit_wants(self) -> None:
        """A lease has asked for pages if a sequence is close to using it up, and not before."""
        for name, terms in self.terms.items():
            lengths = [
                len(live.item.prompt_token_ids) + len(self.emitted[sequence])
                for sequence, live in self.live.items()
                if live.item.lease is not None
                and live.item.lease.lease_id == name
                and sequence in self.noted
            ]
            pages = terms.sealed_pages // terms.sequences
            covered = self.leader.account.info.geometry.tokens_within(pages)
            due = any(tokens + AHEAD_TOKENS > covered for tokens in lengths)
            if due and terms.sealed_pages < terms.max_sealed_pages:
                SEEN.add("leases nearly used up")
                assert name in self.asked
            elif lengths and terms.sequences == 1:
                assert name not in self.asked

    def note(self, update: AccountUpdate) -> None:
        for name in [*(terms.lease_id for terms in update.arrived), *update.first_tokens]:
            self.reported[name] += 1
            assert self.reported[name] <= 2, "arrival and first token, once each"
        for want in update.wants:
            self.asked.add(want.lease_id)
            assert want.prompt_tokens == 2 < want.tokens
        for end in update.ended:
            assert end.lease_id not in self.ended
            self.ended[end.lease_id] = end.output_tokens

    async def finish(self) -> None:
        for name, terms in [*self.terms.items()]:
            self.extend(name, terms.max_sealed_pages)
        for _ in range(600):
            if not self.live:
                break
            await self.call("turns", 0, 1)
        assert [*self.live] == [], "these do not end"
        if self.draining is not None:
            await asyncio.wait_for(self.draining, 60)


NUMBERS = {
    "submit": (30, 4),
    "submit_again": (2, 2),
    "abort": (4, 1),
    "lose_client": (4, 1),
    "withdraw": (4, 1),
    "withdraw_unknown": (2, 0),
    "grow": (6, 2),
    "grow_ended": (1, 0),
    "turns": (30, 2),
    "drain": (0.5, 0),
    "fail": (1, 0),
}


@SEEN.required
@scenarios(120)
@given(seed=SEEDS)
def test_every_client_gets_its_own_and_the_router_every_change(seed: int) -> None:
    chance = Random(seed)
    in_flight = chance.choice([1, 2])

    async def scenario(calls: Sequence[tuple[str, ...]]) -> None:
        machine = LeaderMachine(in_flight)
        await machine.start()
        for what, *numbers in calls:
            await machine.call(what, *map(int, numbers))
        await machine.finish()

    names = chance.choices([*NUMBERS], [weight for weight, _ in NUMBERS.values()], k=40)
    calls = [(x, *(str(chance.randrange(600)) for _ in range(NUMBERS[x][1]))) for x in names]
    check(lambda some: asyncio.run(scenario(some)), calls)
