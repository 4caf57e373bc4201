"""How many pages a request takes, on each group."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.routing.group import Kind, Shape
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.workers.sizes import PageNeed


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request would hold on a group of one shape.

    most: if it used all of its max_tokens; the group must be able to hold this
    leased: what the router reserves at first
    total_tokens: prompt and output of one sequence at most
    """

    most: PageNeed
    leased: PageNeed
    total_tokens: int


@dataclass(frozen=True, slots=True)
class OutputEstimate:
    """Output tokens of one sequence.

    leased: what the lease covers at first; expected: for projecting its end
    """

    leased: int
    expected: int


def times(need: PageNeed, count: int) -> PageNeed:
    return PageNeed(hot=need.hot * count, sealed=need.sealed * count)


@dataclass(frozen=True, slots=True)
class DemandModel:
    """Turns a request into output estimates, and those into pages.

    lease_quantile: of the output lengths seen, that a short prompt's lease covers
    long_share: a prompt is long if max_tokens is at most this share of it; the
        worst case then costs little, and is leased in full
    """

    lengths: OutputLengths
    lease_quantile: float = 0.9
    long_share: float = 0.25

    def output(self, request: PlaceRequest) -> OutputEstimate:
        """A resumed request is leased in full: it shall not be disturbed again."""
        limit, prompt = request.max_tokens, request.prompt_tokens
        expected = min(limit, self.lengths.quantile(request.tenant, prompt, 0.5) or limit)
        if request.resumed or limit <= self.long_share * prompt:
            return OutputEstimate(limit, expected)
        covered = self.lengths.quantile(request.tenant, prompt, self.lease_quantile)
        return OutputEstimate(min(limit, covered or limit), expected)

    def demand(self, request: PlaceRequest, output: OutputEstimate, shape: Shape) -> Demand:
        """The demand on a group of that shape.

        The last token sampled is never written to the cache, but the page it would
        begin is counted: engines allocate before they sample. Hot pages are bounded
        by a sequence's windows and leased in full.
        """
        total_tokens = request.prompt_tokens + request.max_tokens
        within = min(total_tokens, shape.max_model_len)
        most = times(shape.geometry.peak_need(within), request.sequences)
        covered = min(request.prompt_tokens + output.leased, within)
        sealed = len(shape.geometry.sealed_range(covered)) * request.sequences
        return Demand(most, PageNeed(most.hot, sealed), total_tokens)


def never_fits(request: PlaceRequest, demand: Demand, kind: Kind) -> Reason | None:
    """Why no group of the kind could take the request even when empty; None if one could."""
    if request.min_quality is not None and kind.quality < request.min_quality:
        return Reason.QUALITY
    if demand.total_tokens > kind.shape.max_model_len:
        return Reason.CONTEXT
    if request.sequences > kind.max_sequences:
        return Reason.SEQUENCES
    return None if demand.most.fits(kind.capacity) else Reason.PAGES
