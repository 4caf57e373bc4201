"""What the router is asked."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.routing.accepted_formats import ANY_FORMAT, AcceptedFormats


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """A request as the router sees it: sizes, not contents.

    request_id: unique among live requests
    prompt_tokens: including tokens already emitted, when the request is resumed
    max_tokens: of output still to come, for each sequence
    priority: higher goes first
    timeout_s: the request is of no use if it has not started by then
    page_hashes: chained content hashes of the prompt's full pages, in order
    accepts: KV formats of groups
    lost_engines: epochs of engines that the request has lost; a group counts as down for
        it until another incarnation of its engine is up, or the router still has this one
        after a while
    resumed: lost its group while running; goes first within its priority, and is
        leased in full so that it is not disturbed again
    supersedes: an older incarnation with the same id is aborted first; `resumed` implies it
    sequences: how many share the request (n > 1); one lease covers all of them
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    tenant: str = "default"
    priority: int = 0
    timeout_s: float | None = None
    page_hashes: tuple[bytes, ...] = ()
    accepts: AcceptedFormats = ANY_FORMAT
    lost_engines: frozenset[str] = frozenset()
    resumed: bool = False
    supersedes: bool = False
    sequences: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens", "sequences"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be greater than 0, got {self.timeout_s}")
