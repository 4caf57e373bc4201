"""The leases of an engine's sequences, and what to report to the router about them.

    admit ──► note (tokens so far) ──► wants more ──► extend ──► … ──► end
                    │                                                    │
                    └── first token          take_update: all of it ◄────┘

The leader's event loop owns it and counts tokens there as it delivers them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmesh.workers.errors import PoolCapacityError
from kvmesh.workers.lease import AccountUpdate, LeaseEnd, LeaseTerms, LeaseWant
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sizes import PageGeometry, PageNeed

# Ask for more pages this many tokens before a lease is used up. A sequence that uses up its
# lease before the answer pauses.
AHEAD_TOKENS = 16
NEVER = sys.maxsize


@dataclass(slots=True, eq=False)
class HeldLease:
    """A lease with live sequences.

    next_note_tokens: `note` has nothing to do before a sequence has this many tokens,
        prompt included
    live: sequences that have not ended
    output_tokens: of the longest that ended; None once one ended unnaturally
    """

    terms: LeaseTerms
    prompt_tokens: int
    live: int
    output_tokens: int | None
    next_note_tokens: int = 0
    started: bool = False


@dataclass(slots=True)
class _Pending:
    """What has not been reported yet."""

    arrived: dict[str, LeaseTerms] = field(default_factory=dict)
    first_tokens: list[str] = field(default_factory=list)
    wants: dict[str, LeaseWant] = field(default_factory=dict)
    ended: list[LeaseEnd] = field(default_factory=list)


class LeaseBook:
    """All leases of one engine.

    capacity: pages of one rank that leases may cover
    """

    def __init__(self, geometry: PageGeometry, capacity: PageNeed) -> None:
        self._geometry = geometry
        self._capacity = capacity
        self._held: dict[str, HeldLease] = {}
        self._charged = PageNeed(0, 0)
        self._unmet: dict[str, LeaseWant] = {}
        self._pending = _Pending()

    @property
    def leases(self) -> tuple[LeaseTerms, ...]:
        return tuple(held.terms for held in self._held.values())

    def check(self, terms: LeaseTerms) -> None:
        """Raise PoolCapacityError if the lease exceeds what other leases leave."""
        wanted = _charge(terms)
        room = self._capacity - self._charged
        if not wanted.fits(room):
            needed, available = self._geometry.bytes_of(wanted), self._geometry.bytes_of(room)
            raise PoolCapacityError(
                f"the lease asks for {needed:,} bytes of KV; other leases leave {available:,}",
                needed_bytes=needed,
                available_bytes=available,
                retryable=True,
            )

    def admit(self, terms: LeaseTerms, requests: Sequence[EngineRequest]) -> HeldLease:
        """Add a lease with all of its sequences."""
        prompt_tokens = max(len(request.prompt_token_ids) for request in requests)
        resumed = any(request.resumed_tokens for request in requests)
        held = HeldLease(terms, prompt_tokens, len(requests), None if resumed else 0)
        self._held[terms.lease_id] = held
        self._charged += _charge(terms)
        self._pending.arrived[terms.lease_id] = terms
        self._want_if_due(held, prompt_tokens)
        held.next_note_tokens = 0  # report the first token
        return held

    def note(self, held: HeldLease, tokens: int) -> None:
        """A sequence of the lease has `tokens` tokens, prompt included."""
        if not held.started:
            held.started = True
            self._pending.first_tokens.append(held.terms.lease_id)
        self._want_if_due(held, tokens)

    def extend(self, terms: LeaseTerms) -> bool:
        """The lease has grown. Returns False if it has no sequences any more."""
        held = self._held.get(terms.lease_id)
        if held is None:
            return False
        self._charged += _charge(terms) - _charge(held.terms)
        held.terms = terms
        held.next_note_tokens = 0
        self._unmet.pop(terms.lease_id, None)
        self._pending.wants.pop(terms.lease_id, None)
        return True

    def end(self, held: HeldLease, output_tokens: int | None) -> None:
        """A sequence of the lease has ended.

        output_tokens: None unless it ended naturally
        """
        held.live -= 1
        if output_tokens is None or held.output_tokens is None:
            held.output_tokens = None
        else:
            held.output_tokens = max(held.output_tokens, output_tokens)
        if held.live:
            return
        lease_id = held.terms.lease_id
        del self._held[lease_id]
        self._charged -= _charge(held.terms)
        self._unmet.pop(lease_id, None)
        self._pending.wants.pop(lease_id, None)
        self._pending.ended.append(LeaseEnd(lease_id, held.output_tokens or None))

    def withdraw(self, lease_id: str) -> None:
        """Report a withdrawn lease as ended, because it has no sequences."""
        if all(end.lease_id != lease_id for end in self._pending.ended):
            self._pending.ended.append(LeaseEnd(lease_id))

    def take_update(self) -> AccountUpdate:
        """The changes since the last call."""
        pending, self._pending = self._pending, _Pending()
        return AccountUpdate(
            tuple(pending.arrived.values()),
            tuple(pending.first_tokens),
            tuple(pending.wants.values()),
            tuple(pending.ended),
        )

    def restate(self) -> AccountUpdate:
        """What a new router must know besides `leases`."""
        self._pending = _Pending()
        started = (held.terms.lease_id for held in self._held.values() if held.started)
        return AccountUpdate((), tuple(started), tuple(self._unmet.values()))

    def _want_if_due(self, held: HeldLease, tokens: int) -> None:
        terms = held.terms
        covered = self._geometry.tokens_within(terms.sealed_pages // terms.sequences)
        asked = terms.lease_id in self._unmet
        if asked or terms.sealed_pages >= terms.max_sealed_pages:
            held.next_note_tokens = NEVER  # until it is extended
        elif tokens + AHEAD_TOKENS <= covered:
            held.next_note_tokens = covered - AHEAD_TOKENS + 1
        else:
            held.next_note_tokens = NEVER
            want = LeaseWant(terms.lease_id, held.prompt_tokens, tokens + AHEAD_TOKENS)
            self._unmet[terms.lease_id] = self._pending.wants[terms.lease_id] = want


def _charge(terms: LeaseTerms) -> PageNeed:
    """The pages that the lease adds to those of earlier leases."""
    return PageNeed(terms.hot_pages, terms.sealed_pages - terms.shared_sealed_pages)
