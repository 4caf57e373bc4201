"""How many pages a request takes, on each group."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.workers.sizes import PageNeed


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request would hold on one group.

    most: if it used all of its max_tokens; the group must be able to hold this
    leased: what the router reserves at first
    leased_bytes: over all ranks
    total_tokens: prompt and output of one sequence at most
    """

    most: PageNeed
    leased: PageNeed
    leased_bytes: int
    total_tokens: int


def times(need: PageNeed, count: int) -> PageNeed:
    return PageNeed(hot=need.hot * count, sealed=need.sealed * count)


def worst_case(request: PlaceRequest, spec: GroupSpec) -> Demand:
    """The demand if every sequence used all of its max_tokens.

    The last token sampled is never written to the cache, but the page it would
    begin is counted: engines allocate before they sample.
    """
    total_tokens = min(request.prompt_tokens + request.max_tokens, spec.max_model_len)
    most = times(spec.geometry.peak_need(total_tokens), request.sequences)
    return Demand(
        most=most,
        leased=most,
        leased_bytes=spec.geometry.bytes_of(most),
        total_tokens=request.prompt_tokens + request.max_tokens,
    )
