"""How many pages a request takes, and how long it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmesh.cluster.routing.config import RouterTuning
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.prefix_index import PrefixIndex
from kvmesh.cluster.routing.request import Past, PlaceRequest
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
class RequestDemand:
    """A request in terms of pages and time, at one moment's knowledge.

    kinds, by_kind: of engines, and the demand on each; groups know their kind's index
    leased_tokens: of each sequence's output, that the lease covers at first
    prefill_s: to compute the whole prompt, uncorrected
    blocks: hashes of the prompt's runs of `block_pages` pages
    cached_blocks: by group, how many of them it holds; groups without any are missing
    """

    request: PlaceRequest
    kinds: Sequence[EngineKind]
    by_kind: Sequence[KindDemand]
    leased_tokens: int
    prefill_s: float
    blocks: tuple[bytes, ...]
    block_pages: int
    cached_blocks: Mapping[str, int]

    def cached_tokens(self, group: str, page_size: int) -> int:
        """Of the prompt, on a group; its last token is computed in any case."""
        tokens = self.cached_blocks.get(group, 0) * self.block_pages * page_size
        return min(tokens, self.request.prompt_tokens - 1)

    @property
    def page_share(self) -> float:
        """Of a group's sealed pages, on the kind of group where the request takes least."""
        shares = (
            here.leased.sealed / max(kind.capacity.sealed, 1)
            for kind, here in zip(self.kinds, self.by_kind, strict=True)
        )
        return min(shares, default=0.0)

    def sealed_blocks(self, kind: int) -> tuple[bytes, ...]:
        """Of the prompt's blocks, those that a group stores sealed: equal ones only once."""
        return self.blocks[: self.by_kind[kind].num_blocks]


class DemandModel:
    """Turns a request into output to expect, and that into pages."""

    def __init__(self, lengths: OutputLengths, index: PrefixIndex, tuning: RouterTuning) -> None:
        self._lengths = lengths
        self._index = index
        self._tuning = tuning

    def demand(self, request: PlaceRequest, kinds: Sequence[EngineKind]) -> RequestDemand:
        tuning = self._tuning
        # Hashes are chained: the last one of each run of pages stands for all before it.
        blocks = request.page_hashes[tuning.block_pages - 1 :: tuning.block_pages]
        leased = self._leased_tokens(request)
        return RequestDemand(
            request=request,
            kinds=kinds,
            by_kind=[self._on(kind, request, leased) for kind in kinds],
            leased_tokens=leased,
            prefill_s=tuning.pace.prefill_s(request.prompt_tokens),
            blocks=blocks,
            block_pages=tuning.block_pages,
            cached_blocks=self._index.match(blocks),
        )

    def _leased_tokens(self, request: PlaceRequest) -> int:
        """The usual output; all of it for a resumed request, not to be disturbed again."""
        limit = request.max_tokens
        if request.past is Past.RAN:
            return limit
        return min(limit, self._lengths.median(request.tenant, request.prompt_tokens) or limit)

    def _on(self, kind: EngineKind, request: PlaceRequest, leased_tokens: int) -> KindDemand:
        """The demand on groups of one kind.

        The last token sampled is never written to the cache, but the page that
        it would start is counted: engines allocate before they sample. Hot pages are bounded
        by a sequence's windows and leased in full.
        """
        geometry, sequences, prompt = kind.geometry, request.sequences, request.prompt_tokens
        total = prompt + request.max_tokens
        peak = geometry.peak_need(min(total, kind.max_model_len))
        max_need = PageNeed(peak.hot * sequences, peak.sealed * sequences)
        covered = min(prompt + leased_tokens, kind.max_model_len)
        leased = PageNeed(max_need.hot, geometry.sealed_need(covered) * sequences)
        num_blocks = geometry.sealed_range(prompt).stop // self._tuning.block_pages
        return KindDemand(max_need, leased, num_blocks, _never(kind, total, sequences, max_need))


def _never(kind: EngineKind, total_tokens: int, sequences: int, need: PageNeed) -> Reason | None:
    if total_tokens > kind.max_model_len:
        return Reason.CONTEXT
    if sequences > kind.max_sequences:
        return Reason.SEQUENCES
    return None if need.fits(kind.capacity) else Reason.PAGES
