"""A request inside the engine: its tokens, its pages, its progress."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmesh.workers.deal import DEAL_TOKENS, PageDeal
from kvmesh.workers.lease import LeaseTerms
from kvmesh.workers.plan import PENDING
from kvmesh.workers.prefix_cache import Digest, PageDigests
from kvmesh.workers.request import EngineRequest, PrefillProgress, TokenIds
from kvmesh.workers.sizes import PageGeometry, PageNeed
from kvmesh.workers.structured.state import OutputState


@dataclass(frozen=True, slots=True)
class HeldPages:
    """What a sequence holds.

    pages: on all ranks that share its pages; on_fullest: on the one that has most
    """

    pages: PageNeed
    on_fullest: PageNeed

    def or_more(self, other: HeldPages) -> HeldPages:
        return HeldPages(self.pages.or_more(other.pages), self.on_fullest.or_more(other.on_fullest))


class Sequence:
    """Positions [0, num_computed) have their keys and values in pages, once the steps in flight
    have been computed. Of its tokens the last `pending` ones are still being sampled by such steps.

        0          prompt_tokens        num_tokens   length    max_tokens_total
        |---- prompt ----|---- output -------|- pending -|............|
        |-------- computed -------|------ to compute ----|

    hot, sealed: logical page -> page id of the forms it holds
    deal: the ranks to which its pages belong; decided when it gets its first page, by the tokens
        that it then has
    shares_pages: whether it uses other sequences' pages and they use its own
    pinned_tokens: of its prompt, that stay cached when it has ended
    output_state: within its constraint, None without one; `prepared` once it is there
    """

    def __init__(self, request: EngineRequest, geometry: PageGeometry, max_model_len: int) -> None:
        self.request = request
        self.geometry = geometry
        given = self._given_tokens = len(request.prompt_token_ids)
        self.prompt_tokens = given - request.resumed_tokens
        self.max_tokens_total = min(self.prompt_tokens + request.params.max_tokens, max_model_len)
        # A resumed sequence may already have all the tokens that it may have.
        self._tokens: TokenIds = np.empty(max(self.max_tokens_total, given), dtype=np.int32)
        self._tokens[:given] = request.prompt_token_ids
        self.extend(request.lease)
        self.num_tokens = given
        self.pending = 0
        self.num_computed = 0
        # Full pages that other sequences can find, from the first on: with their contents, and in
        # sealed form.
        self.num_named: int
        self.num_sealed_named: int
        # Positions of the prompt, from the first on, whose next token's score is computed.
        self.num_scored = request.scored_tokens
        self.row: int | None = None
        self.hot: dict[int, int] = {}
        self.sealed: dict[int, int] = {}
        self.deal: PageDeal
        self._deal_is_known: bool
        self._digests = PageDigests(geometry.page_size, request.cache_salt)
        self.shares_pages = True
        self.output_state: OutputState | None = None
        self.prepared = request.constraint is None
        self.cached_tokens = 0
        self.pinned_tokens = 0
        self.preemptions = 0
        self.peak = HeldPages(PageNeed(0, 0), PageNeed(0, 0))
        self.arrived_s = 0.0
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.progress_s: float  # when its progress was reported last

    @property
    def tokens(self) -> TokenIds:
        """[num_tokens] int32, prompt then output; a view."""
        return self._tokens[: self.num_tokens]

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.prompt_tokens

    @property
    def to_score(self) -> int:
        """How many positions have a score in the end: all of the prompt's but the last."""
        return 0 if self.request.params.prompt_logprobs is None else self.prompt_tokens - 1

    @property
    def length(self) -> int:
        """Tokens that it has once the steps in flight have been computed, unless one ends it."""
        return self.num_tokens + self.pending

    @property
    def to_compute(self) -> int:
        """How many tokens are left to compute."""
        return 0 if self.about_to_end else self.length - self.num_computed

    @property
    def about_to_end(self) -> bool:
        """It ends with a token that is pending, if not before."""
        return self.pending > 0 and self.length >= self.max_tokens_total

    def extend(self, lease: LeaseTerms | None) -> None:
        """Run under these terms from now on; without a lease every token may be written.

        leased_tokens: how many tokens may be written under the lease
        """
        self.lease = lease
        self.leased_tokens = len(self._tokens)
        if lease is not None:
            self.leased_tokens = self.geometry.tokens_within(lease.sealed_pages // lease.sequences)

    def take_deal(self, deal: PageDeal) -> None:
        """Its pages will belong to these ranks; it has none yet."""
        self.deal = deal
        self._deal_is_known = deal.kvp == 1 or self.num_tokens >= DEAL_TOKENS

    @property
    def is_findable(self) -> bool:
        """Whether it shares pages, and these lie where all others look for them (deal.py)."""
        return self.shares_pages and self._deal_is_known

    @property
    def paused(self) -> bool:
        """Its lease has to grow before it can continue; it keeps its pages until then."""
        return self.num_computed >= self.leased_tokens

    @property
    def on_trial(self) -> bool:
        """An engine may have failed because of it, and this one has yet to give it a token."""
        return self.request.suspicion > 0 and self.num_tokens == self._given_tokens

    def tokens_of(self, start: int, end: int) -> bytes:
        """The tokens at positions [start, end) as a plan has them: known, or one pending."""
        return PENDING if start >= self.num_tokens else self._tokens[start:end].tobytes()

    def append(self, token_id: int) -> None:
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    def digests(self, num_pages: int) -> list[Digest]:
        """Digests of at least the first `num_pages` full pages."""
        return self._digests.upto(self.tokens, num_pages)

    def sealed_missing(self, num_tokens: int) -> range:
        """Logical pages that must be sealed before `num_tokens` are written.

        Pages are sealed in order, so the missing ones are a range."""
        due = self.geometry.sealed_range(num_tokens)
        return due[len(self.sealed) :]

    def hot_by_rank(self) -> list[int]:
        """How many hot pages it holds on each rank."""
        if self.deal.kvp == 1:
            return [len(self.hot)]
        counts = [0] * self.deal.kvp
        for page in self.hot.values():
            counts[page % self.deal.kvp] += 1
        return counts

    def held_pages(self) -> HeldPages:
        sealed = len(self.sealed)
        on_fullest = PageNeed(max(self.hot_by_rank()), self.geometry.on_fullest(sealed))
        return HeldPages(PageNeed(len(self.hot), sealed), on_fullest)

    def note_held(self, held: HeldPages) -> None:
        """It held these in a step that has been computed."""
        self.peak = self.peak.or_more(held)

    def progress(self, end: int) -> PrefillProgress:
        """end: of the latest chunk that has been computed"""
        computed = min(end, self.num_computed)
        return PrefillProgress(computed, min(self.cached_tokens, computed), self.num_tokens)
