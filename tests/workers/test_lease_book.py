"""An engine's reports of its leases to the router: each event once, in any order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvmesh.workers.errors import PoolCapacityError
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseTerms, LeaseWant
from kvmesh.workers.lease_book import AHEAD_TOKENS, NEVER, HeldLease, LeaseBook
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import PageGeometry, PageNeed

PAGE = 16
GEOMETRY = PageGeometry(PAGE, 0, 0, hot_page_bytes=100, sealed_page_bytes=10)
TERMS = LeaseTerms("l", 1, hot_pages=2, sealed_pages=4, max_sealed_pages=12, sequences=2)


def book() -> LeaseBook:
    return LeaseBook(GEOMETRY, PageNeed(hot=6, sealed=20))


def book_leases(made: LeaseBook) -> tuple[LeaseTerms, ...]:
    return made.leases


def requests(terms: LeaseTerms, tokens: int = 20, resumed: int = 0) -> list[EngineRequest]:
    return [
        EngineRequest(
            f"{terms.lease_id}.{i}",
            np.zeros(tokens, np.int32),
            SamplingParams(),
            terms,
            resumed_tokens=resumed,
        )
        for i in range(terms.sequences)
    ]


def admitted(terms: LeaseTerms = TERMS, resumed: int = 0) -> tuple[LeaseBook, HeldLease]:
    made = book()
    held = made.admit(terms, requests(terms, resumed=resumed))
    assert made.take_update() == AccountUpdate(arrived=(terms,))
    return made, held


def test_the_first_token_is_reported_once() -> None:
    made, held = admitted()
    assert held.next_note_tokens == 0
    made.note(held, 21)
    made.note(held, 22)
    assert made.take_update() == AccountUpdate(first_tokens=("l",))
    assert not made.take_update()


def test_pages_are_requested_once_ahead_of_need_and_again_after_growth() -> None:
    made, held = admitted()
    covered = GEOMETRY.tokens_within(TERMS.sealed_pages // 2)
    made.note(held, 21)
    assert held.next_note_tokens == covered - AHEAD_TOKENS + 1
    made.take_update()
    made.note(held, held.next_note_tokens - 1)
    assert not made.take_update(), "not before it is due"
    due = held.next_note_tokens
    made.note(held, due)
    want = LeaseWant("l", 20, due + AHEAD_TOKENS)
    assert made.take_update() == AccountUpdate(wants=(want,))
    assert held.next_note_tokens == NEVER, "it asks only once"
    assert made.extend(replace(TERMS, sealed_pages=8))
    made.note(held, due + 1)
    assert not made.take_update()
    assert held.next_note_tokens == GEOMETRY.tokens_within(4) - AHEAD_TOKENS + 1
    assert made.extend(replace(TERMS, sealed_pages=12))
    made.note(held, due + 2)
    assert held.next_note_tokens == NEVER, "it can grow no further"


def test_a_lease_that_is_nearly_used_up_on_arrival_requests_pages_at_once() -> None:
    made = book()
    terms = replace(TERMS, sealed_pages=2)
    held = made.admit(terms, requests(terms))
    assert made.take_update() == AccountUpdate((terms,), (), (LeaseWant("l", 20, 36),))
    made.note(held, 21)
    assert made.take_update() == AccountUpdate(first_tokens=("l",)), "it has asked"
    assert made.restate().wants == (LeaseWant("l", 20, 36),)


def test_an_open_want_is_reported_to_a_new_router_until_it_is_met() -> None:
    made, held = admitted()
    made.note(held, 100)
    want = LeaseWant("l", 20, 116)
    assert made.restate() == AccountUpdate((), ("l",), (want,))
    assert not made.take_update(), "restating includes it"
    assert made.restate().wants == (want,)
    made.extend(replace(TERMS, sealed_pages=12))
    assert made.restate() == AccountUpdate((), ("l",))


@pytest.mark.parametrize(
    ("outputs", "resumed", "learned"),
    [((5, 9), 0, 9), ((9, 5), 0, 9), ((5, None), 0, None), ((None, 5), 0, None), ((5, 9), 3, None)],
)
def test_a_lease_ends_with_its_last_sequence(
    outputs: tuple[int | None, ...], resumed: int, learned: int | None
) -> None:
    made, held = admitted(resumed=resumed)
    made.end(held, outputs[0])
    assert book_leases(made) == (TERMS,)
    assert not made.take_update()
    made.end(held, outputs[1])
    assert book_leases(made) == ()
    assert made.take_update() == AccountUpdate(ended=(LeaseEnd("l", learned),))
    assert not made.extend(TERMS)


def test_a_lease_that_ends_as_it_is_withdrawn_ends_once() -> None:
    made, held = admitted(replace(TERMS, sequences=1))
    made.end(held, 7)
    made.withdraw("l")
    made.withdraw("never came")
    ended = (LeaseEnd("l", 7), LeaseEnd("never came"))
    assert made.take_update() == AccountUpdate(ended=ended)


def test_what_leases_cover_never_exceeds_the_pool() -> None:
    made, held = admitted()
    fits = replace(TERMS, lease_id="m", sealed_pages=16)
    made.check(fits)
    for more in (replace(fits, sealed_pages=17), replace(fits, hot_pages=5)):
        with pytest.raises(PoolCapacityError) as caught:
            made.check(more)
        assert caught.value.retryable
    # Shared pages were paid for by an earlier lease.
    made.check(replace(fits, sealed_pages=20, shared_sealed_pages=4))
    made.extend(replace(TERMS, sealed_pages=8))
    with pytest.raises(PoolCapacityError):
        made.check(fits)
    made.end(held, 1)
    made.end(held, 1)
    made.check(replace(fits, hot_pages=6, sealed_pages=20))


def test_a_want_is_not_reported_once_its_lease_has_ended() -> None:
    made, held = admitted(replace(TERMS, sequences=1))
    made.note(held, 21)
    made.note(held, 200)
    made.end(held, 180)
    update = made.take_update()
    assert update.wants == ()
    assert update.ended == (LeaseEnd("l", 180),)
