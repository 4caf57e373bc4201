"""What the router is asked."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvmesh.cluster.routing.accepted_formats import ANY_FORMAT, AcceptedFormats


class Past(enum.IntEnum):
    """What has become of a request before; each value includes those below it.

    AGAIN: its client has asked again, so any other incarnation is aborted first
    ACCEPTED: it waited, or had a lease that its engine did not take: it may wait though the
        queue is full, or the router drains. If another incarnation is live, its client has
        asked again meanwhile, so it is refused
    RAN: it lost its group while running: its tenant's quota does not hold it up, and it is
        leased in full so that it is not disturbed again
    Those that were accepted go first within their priority.
    """

    NEW = 0
    AGAIN = 1
    ACCEPTED = 2
    RAN = 3


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """A request as the router sees it: sizes, not contents.

    request_id: unique among live requests
    prompt_tokens: including tokens already emitted, when the request is resumed
    max_tokens: of output still to come, for each sequence
    priority: higher goes first
    timeout_s: the request is of no use if it has not started by then
    own_deadline: whether that is its client's deadline, and not the longest wait of the server
    page_hashes: chained content hashes of the prompt's full pages, in order
    accepts: KV formats of groups
    lost_engines: epochs of engines that the request has lost; a group counts as down for
        it until another incarnation of its engine is up, or the router still has this one
        after a while
    sequences: how many share the request (n > 1); one lease covers all of them
    incarnation: differs between the times that a client asks for one request
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    tenant: str = "default"
    priority: int = 0
    timeout_s: float | None = None
    own_deadline: bool = True
    page_hashes: tuple[bytes, ...] = ()
    accepts: AcceptedFormats = ANY_FORMAT
    lost_engines: frozenset[str] = frozenset()
    past: Past = Past.NEW
    sequences: int = 1
    incarnation: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens", "sequences"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be greater than 0, got {self.timeout_s}")
