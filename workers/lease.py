"""A lease as its engine sees it, and the updates of an engine's account with the router."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """A reservation of pages on one group, as the router granted it; pages of one rank.

    epoch: of the router that granted it
    number: of that router's grants before it, which orders leases by age
    hot_pages, sealed_pages: of all its sequences together
    max_sealed_pages: size to which the lease may grow
    shared_sealed_pages: of its sealed pages, those that an earlier lease of the group paid
        for when it was granted
    sequences: how many share it; each has an equal part
    request_id, tenant, incarnation: of its request, for a later router
    """

    lease_id: str
    epoch: int
    hot_pages: int
    sealed_pages: int
    max_sealed_pages: int
    shared_sealed_pages: int = 0
    sequences: int = 1
    number: int = 0
    request_id: str = ""
    tenant: str = ""
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class LeaseWant:
    """A lease needs more pages before its sequences can continue.

    prompt_tokens: of its longest sequence, resumed output included
    tokens: length to which each sequence will grow, prompt included
    """

    lease_id: str
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """All sequences of a lease have ended and their pages are free.

    output_tokens: of the longest sequence, if all of them ended naturally and none was
        resumed, to learn from; otherwise None
    """

    lease_id: str
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class AccountUpdate:
    """What has changed in an engine's account since its last update, in no particular order.

    arrived: leases whose sequences the engine has accepted
    first_tokens: ids of leases that have generated their first token
    wants: at most one per lease; a later one replaces it
    """

    arrived: tuple[LeaseTerms, ...] = ()
    first_tokens: tuple[str, ...] = ()
    wants: tuple[LeaseWant, ...] = ()
    ended: tuple[LeaseEnd, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.arrived or self.first_tokens or self.wants or self.ended)


@dataclass(frozen=True, slots=True)
class PageChanges:
    """Blocks of pages that an engine's prefix cache has gained and lost, by the digests of
    their last pages."""

    held: tuple[bytes, ...] = ()
    dropped: tuple[bytes, ...] = ()
