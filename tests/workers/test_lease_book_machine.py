"""The lease book under any sequence of events, next to a model of what the router must learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest
from hypothesis import given

from kvmesh.workers.errors import PoolCapacityError
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseTerms, LeaseWant
from kvmesh.workers.lease_book import AHEAD_TOKENS, HeldLease, LeaseBook
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageGeometry, PageNeed
from tests.exercised import Exercised
from tests.scenarios import SEEDS, check, scenarios

PAGE = 16
GEOMETRY = PageGeometry(PAGE, 1, 1, hot_page_bytes=100, sealed_page_bytes=10)
CAPACITY = PageNeed(hot=12, sealed=30)
SEEN = Exercised(
    "lease book",
    {
        "admissions": 400,
        "refusals": 100,
        "wants": 150,
        "growths": 150,
        "growths after the end": 20,
        "first tokens": 300,
        "ends of one of several sequences": 100,
        "ends to learn from": 60,
        "ends to forget": 100,
        "withdrawals": 50,
        "restatements of open wants": 20,
    },
)


@dataclass(slots=True, eq=False)
class Lease:
    """As the model knows it. tokens: of each live sequence"""

    terms: LeaseTerms
    held: HeldLease
    prompt_tokens: int
    tokens: list[int]
    learnable: bool
    outputs: list[int] = field(default_factory=list)
    started: bool = False
    want: LeaseWant | None = None

    def note(self, tokens: int) -> LeaseWant | None:
        """What the lease asks for when a sequence has so many tokens, once until it has grown."""
        pages = self.terms.sealed_pages // self.terms.sequences
        within = GEOMETRY.need(tokens + AHEAD_TOKENS).sealed <= pages
        if self.want or within or self.terms.sealed_pages == self.terms.max_sealed_pages:
            return None
        self.want = LeaseWant(self.terms.lease_id, self.prompt_tokens, tokens + AHEAD_TOKENS)
        return self.want


class BookMachine:
    def __init__(self) -> None:
        self.book = LeaseBook(GEOMETRY, CAPACITY)
        self.leases: list[Lease] = []
        self.made = 0
        self.arrived: list[LeaseTerms] = []
        self.first: list[str] = []
        self.wants: dict[str, LeaseWant] = {}
        self.ended: list[LeaseEnd] = []

    def call(self, what: str, numbers: tuple[int, ...]) -> None:
        getattr(self, what)(*numbers)
        assert self.book.leases == tuple(lease.terms for lease in self.leases)

    def admit(self, sequences: int, pages: int, prompt: int, shared: int) -> None:
        self.made += 1
        sequences, pages = 1 + sequences % 3, 1 + pages % 9
        shared = min(shared % 3, pages - 1)
        terms = LeaseTerms(f"l{self.made}", 1, sequences, pages, pages + 6, shared, sequences)
        covered = PageNeed(
            sum(x.terms.hot_pages for x in self.leases),
            sum(x.terms.sealed_pages - x.terms.shared_sealed_pages for x in self.leases),
        )
        if not (covered + PageNeed(sequences, pages - shared)).fits(CAPACITY):
            SEEN.add("refusals")
            with pytest.raises(PoolCapacityError, match="the lease asks for") as caught:
                self.book.check(terms)
            assert caught.value.retryable
            assert caught.value.needed_bytes == 100 * sequences + 10 * (pages - shared)
            assert caught.value.available_bytes == GEOMETRY.bytes_of(CAPACITY - covered)
            return
        self.book.check(terms)
        resumed = self.made % 4 == 0
        requests = [
            EngineRequest(
                f"{terms.lease_id}.{index}",
                np.zeros(1 + (prompt + 7 * index) % 60, np.int32),
                SamplingParams(),
                terms,
                resumed_tokens=int(resumed and index == sequences - 1),
            )
            for index in range(sequences)
        ]
        tokens = [len(item.prompt_token_ids) for item in requests]
        held = self.book.admit(terms, requests)
        lease = Lease(terms, held, max(tokens), tokens, not resumed)
        self.leases.append(lease)
        self.arrived.append(terms)
        self.note_want(lease.note(max(tokens)))
        SEEN.add("admissions")

    def decode(self, index: int, sequence: int, tokens: int) -> None:
        for lease in self.pick(index):
            sequence %= len(lease.tokens)
            lease.tokens[sequence] += 1 + tokens % 12
            now = lease.tokens[sequence]
            if not lease.started:
                SEEN.add("first tokens")
                lease.started = True
                self.first.append(lease.terms.lease_id)
            self.note_want(lease.note(now))
            if now >= lease.held.next_note_tokens:  # as the leader does
                self.book.note(lease.held, now)

    def note_want(self, want: LeaseWant | None) -> None:
        if want is not None:
            SEEN.add("wants")
            self.wants[want.lease_id] = want

    def grow(self, index: int, pages: int) -> None:
        for lease in self.pick(index):
            limit = lease.terms.max_sealed_pages
            more = min(lease.terms.sealed_pages + 1 + pages % 5, limit)
            lease.terms = replace(lease.terms, sealed_pages=more)
            lease.want = None
            self.wants.pop(lease.terms.lease_id, None)
            assert self.book.extend(lease.terms)
            SEEN.add("growths")

    def grow_ended(self) -> None:
        if self.made and all(x.terms.lease_id != "l1" for x in self.leases):
            SEEN.add("growths after the end")
            assert not self.book.extend(LeaseTerms("l1", 1, 1, 9, 9))

    def end(self, index: int, sequence: int, natural: int) -> None:
        for lease in self.pick(index):
            lease.tokens.pop(sequence % len(lease.tokens))
            output = 1 + sequence % 50 if natural % 3 else None
            self.book.end(lease.held, output)
            lease.learnable &= output is not None
            lease.outputs.append(output or 0)
            if lease.tokens:
                SEEN.add("ends of one of several sequences")
                continue
            self.leases.remove(lease)
            name = lease.terms.lease_id
            self.wants.pop(name, None)
            learned = max(lease.outputs) if lease.learnable else None
            SEEN.add("ends to forget" if learned is None else "ends to learn from")
            self.ended.append(LeaseEnd(name, learned))

    def withdraw(self, ended: int) -> None:
        """A lease that never came, or one that has just ended."""
        names = [end.lease_id for end in self.ended] if ended % 2 else []
        name = names[0] if names else f"never came {self.made}"
        self.book.withdraw(name)
        SEEN.add("withdrawals")
        if name not in [end.lease_id for end in self.ended]:
            self.ended.append(LeaseEnd(name))

    def take(self) -> None:
        wants = tuple(self.wants.values())
        expected = AccountUpdate(tuple(self.arrived), tuple(self.first), wants, tuple(self.ended))
        assert bool(expected) == any((self.arrived, self.first, self.wants, self.ended))
        update = self.book.take_update()
        assert replace(update, wants=()) == replace(expected, wants=())
        assert {*update.wants} == {*expected.wants}
        self.forget()

    def restate(self) -> None:
        open_wants = {lease.want for lease in self.leases if lease.want is not None}
        SEEN.add("restatements of open wants", len(open_wants))
        update = self.book.restate()
        started = tuple(x.terms.lease_id for x in self.leases if x.started)
        assert (update.arrived, update.first_tokens, update.ended) == ((), started, ())
        assert {*update.wants} == open_wants and len(update.wants) == len(open_wants)
        self.forget()

    def forget(self) -> None:
        self.arrived, self.first, self.wants, self.ended = [], [], {}, []
        assert not self.book.take_update()

    def pick(self, index: int) -> list[Lease]:
        return [self.leases[index % len(self.leases)]] if self.leases else []


NUMBERS = {
    "admit": (4, 4),
    "decode": (10, 3),
    "grow": (3, 2),
    "end": (4, 3),
    "grow_ended": (1, 0),
    "withdraw": (1, 1),
    "take": (2, 0),
    "restate": (1, 0),
}


@SEEN.required
@scenarios(120)
@given(seed=SEEDS)
def test_the_router_learns_each_event_once(seed: int) -> None:
    chance = Random(seed)

    def run(calls: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        machine = BookMachine()
        for what, numbers in calls:
            machine.call(what, numbers)
        machine.take()

    names = chance.choices([*NUMBERS], [weight for weight, _ in NUMBERS.values()], k=80)
    calls = [(x, tuple(chance.randrange(600) for _ in range(NUMBERS[x][1]))) for x in names]
    check(run, calls)
