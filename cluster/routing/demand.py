"""How many pages a request takes, and how long it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmesh.cluster.routing.config import RouterTuning
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.verdict import Reason
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageGeometry, PageNeed


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What a request's demand on a group depends on; most groups of a fleet are alike."""

    geometry: PageGeometry
    capacity: PageNeed
    max_model_len: int
    max_sequences: int

    @classmethod
    def of(cls, info: EngineInfo) -> EngineKind:
        return cls(info.geometry, info.capacity, info.max_model_len, info.max_num_seqs)


@dataclass(frozen=True, slots=True)
class KindDemand:
    """A request on groups of one kind.

    max: what it holds if it uses all of its max_tokens; the group must be able to hold this
    leased: what the router reserves at first
    num_blocks: of the prompt's blocks, how many end up sealed
    never: why such a group could not take it even when empty, or None
    """

    max: PageNeed
    leased: PageNeed
    num_blocks: int
    never: Reason | None

    @property
    def to_grow(self) -> int:
        return self.max.sealed - self.leased.sealed


@dataclass(frozen=True, slots=True)
class OutputEstimate:
    """Output tokens of one sequence.

    leased: what the lease covers at first; expected: for projecting its end
    """

    leased: int
    expected: int


@dataclass(frozen=True, slots=True)
class RequestDemand:
    """A request in terms of pages and time, at one moment's knowledge.

    kinds, by_kind: of engines, and the demand on each; groups know their kind's index
    prefill_s: to compute the whole prompt, uncorrected
    blocks: hashes of the prompt's runs of `block_pages` pages
    cached_blocks: by group, how many of them it holds; groups without any are missing
    """

    request: PlaceRequest
    output: OutputEstimate
    kinds: Sequence[EngineKind]
    by_kind: Sequence[KindDemand]
    prefill_s: float
    blocks: tuple[bytes, ...]
    block_pages: int
    cached_blocks: Mapping[str, int]

    @property
    def fits_nowhere(self) -> bool:
        """Whether no group that is known could ever take the request."""
        return all(here.never is not None for here in self.by_kind)

    def cached_tokens(self, group: str, page_size: int) -> int:
        """Of the prompt, on a group; its last token is computed in any case."""
        tokens = self.cached_blocks.get(group, 0) * self.block_pages * page_size
        return min(tokens, self.request.prompt_tokens - 1)

    def sealed_blocks(self, kind: int) -> tuple[bytes, ...]:
        """Of the prompt's blocks, those that a group stores sealed: equal ones only once."""
        return self.blocks[: self.by_kind[kind].num_blocks]


class DemandModel:
    """Turns a request into output estimates, and those into pages."""

    def __init__(self, lengths: OutputLengths, tuning: RouterTuning) -> None:
        self._lengths = lengths
        self._tuning = tuning

    def blocks(self, request: PlaceRequest) -> tuple[bytes, ...]:
        """The prompt's runs of pages, by each one's last hash: hashes are chained."""
        pages = self._tuning.block_pages
        return request.page_hashes[pages - 1 :: pages]

    def output(self, request: PlaceRequest) -> OutputEstimate:
        """Long prompts and resumed requests are leased in full.

        For a long prompt the worst case costs little, and a resumed request is not to be
        disturbed again.
        """
        limit, prompt = request.max_tokens, request.prompt_tokens
        expected = min(limit, self._lengths.quantile(request.tenant, prompt, 0.5) or limit)
        if request.resumed or limit <= self._tuning.long_share * prompt:
            return OutputEstimate(limit, expected)
        share = self._tuning.lease_quantile
        covered = self._lengths.quantile(request.tenant, prompt, share)
        return OutputEstimate(min(limit, covered or limit), expected)

    def demand(
        self,
        request: PlaceRequest,
        kinds: Sequence[EngineKind],
        blocks: tuple[bytes, ...] = (),
        cached_blocks: Mapping[str, int] | None = None,
    ) -> RequestDemand:
        output = self.output(request)
        return RequestDemand(
            request=request,
            output=output,
            kinds=kinds,
            by_kind=[self._on(kind, request, output) for kind in kinds],
            prefill_s=self._tuning.pace.prefill_s(request.prompt_tokens),
            blocks=blocks,
            block_pages=self._tuning.block_pages,
            cached_blocks=cached_blocks or {},
        )

    def _on(self, kind: EngineKind, request: PlaceRequest, output: OutputEstimate) -> KindDemand:
        """The demand on groups of one kind.

        The last token sampled is never written to the cache, but the page it would
        begin is counted: engines allocate before they sample. Hot pages are bounded
        by a sequence's windows and leased in full.
        """
        geometry, sequences, prompt = kind.geometry, request.sequences, request.prompt_tokens
        total = prompt + request.max_tokens
        peak = geometry.peak_need(min(total, kind.max_model_len))
        max_need = PageNeed(peak.hot * sequences, peak.sealed * sequences)
        covered = min(prompt + output.leased, kind.max_model_len)
        leased = PageNeed(max_need.hot, len(geometry.sealed_range(covered)) * sequences)
        num_blocks = geometry.sealed_range(prompt).stop // self._tuning.block_pages
        return KindDemand(max_need, leased, num_blocks, _never(kind, total, sequences, max_need))


def _never(kind: EngineKind, total_tokens: int, sequences: int, need: PageNeed) -> Reason | None:
    if total_tokens > kind.max_model_len:
        return Reason.CONTEXT
    if sequences > kind.max_sequences:
        return Reason.SEQUENCES
    return None if need.fits(kind.capacity) else Reason.PAGES
