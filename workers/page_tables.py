"""The pages that running sequences hold: taken, sealed, shared, and freed again."""

from __future__ import annotations

import zlib
from collections.abc import Collection

from kvmesh.workers.deal import PageDeal
from kvmesh.workers.prefix_cache import Digest, PrefixCache, PrefixHit
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import BLOCK_PAGES, PageGeometry, PageNeed
from kvmesh.workers.step_draft import StepDraft


class PageTables:
    """Writes `Sequence.hot` and `Sequence.sealed`, with page ids of a prefix cache's arenas.

    What the ranks have to know of a change goes into the step's draft.
    """

    def __init__(self, geometry: PageGeometry, cache: PrefixCache) -> None:
        self._geometry = geometry
        self._cache = cache

    def reuse(self, seq: Sequence, max_pages: int) -> PrefixHit:
        """Share cached pages of a sequence's beginning, of which it holds none so far.

        This decides how its pages are dealt: like those that are cached or, if none are, by its
        first tokens, so that sequences that have these in common can share pages later.
        """
        known = seq.digests(max_pages)[:max_pages] if seq.shares_pages else ()
        kvp = self._geometry.kvp
        beginning = seq.tokens[: self._geometry.page_size]
        hit = self._cache.match(known, zlib.crc32(beginning.tobytes()) % kvp if kvp > 1 else 0)
        seq.deal = PageDeal(kvp, hit.offset)
        self._cache.share(hit)
        seq.hot.update(hit.hot)
        seq.sealed.update(hit.sealed)
        return hit

    def give_back(self, seq: Sequence, hit: PrefixHit) -> None:
        """Undo `reuse`: the sequence is not admitted yet."""
        self._cache.unshare(hit)
        seq.hot.clear()
        seq.sealed.clear()

    def write(self, seq: Sequence, pages: range, draft: StepDraft) -> None:
        """Take hot pages for those logical pages that have none."""
        for page in pages:
            if page not in seq.hot:
                seq.hot[page] = self._cache.hot.take(seq.deal.rank_of(page))
                draft.set_hot(seq, page)

    def seal(self, seq: Sequence, pages: range, draft: StepDraft) -> None:
        """Have logical pages sealed, or share what is sealed with the same contents already."""
        for page in pages:
            digest = seq.digests(page + 1)[page]
            found = None
            if seq.shares_pages:
                found = self._cache.find_sealed(digest)
                if found is None:
                    found = draft.being_sealed(seq, digest)
            rank = seq.deal.rank_of(page)
            if found is not None and found % seq.deal.kvp == rank:
                seq.sealed[page] = self._cache.sealed.share(found)
            else:
                seq.sealed[page] = self._cache.sealed.take(rank)
                draft.seal(seq, page, digest)
            draft.set_sealed(seq, page)

    def publish(self, seq: Sequence, first_full: int) -> None:
        """After a step: full pages enter the cache, and outdated hot ones are released.

        first_full: the first logical page that may have become full in the step
        """
        num_full = seq.num_computed // self._geometry.page_size
        due = self._geometry.sealed_range(seq.num_computed)
        outdated = [page for page in seq.hot if page in due]
        if seq.shares_pages:
            digests = seq.digests(num_full)
            for page in range(first_full, num_full):
                self._cache.name_hot(digests[page], seq.hot[page])
                self._note_block(digests, page)
            for page in outdated:
                self._cache.name_sealed(digests[page], seq.sealed[page])
                self._note_block(digests, page)
        for page in outdated:
            near_end = seq.ends_near(page)
            self._cache.release_hot(seq.hot.pop(page), seq.num_computed, at_end=near_end)

    def withdraw(self, seq: Sequence) -> None:
        """Let no other sequence find its pages any more."""
        self._cache.withdraw(seq.digests(seq.num_computed // self._geometry.page_size))

    def free(self, seq: Sequence) -> None:
        """Release all of its pages."""
        # Last pages first, so that a cached prefix is evicted from its end.
        for page in sorted(seq.hot, reverse=True):
            self._cache.release_hot(seq.hot[page], seq.num_computed, at_end=True)
        for page in sorted(seq.sealed, reverse=True):
            self._cache.release_sealed(seq.sealed[page], seq.num_computed)
        seq.hot.clear()
        seq.sealed.clear()

    def check(self, running: Collection[Sequence]) -> None:
        """Audit: every page held by one of these is used, and nothing else is."""
        self._cache.check()
        hot = {page for seq in running for page in seq.hot.values()}
        sealed = {page for seq in running for page in seq.sealed.values()}
        used = PageNeed(self._cache.hot.used, self._cache.sealed.used)
        held = PageNeed(len(hot), len(sealed))
        assert used == held, f"{used} are in use, {held} held by sequences: {_holdings(running)}"

    def _note_block(self, digests: list[Digest], page: int) -> None:
        if (page + 1) % BLOCK_PAGES == 0:
            self._cache.note_block(digests[page])


def _holdings(running: Collection[Sequence]) -> str:
    """What every running sequence holds, in words."""
    holdings = [
        f"{seq.request.request_id} holds {PageNeed(len(seq.hot), len(seq.sealed))}"
        for seq in running
    ]
    return ", ".join(holdings) or "no sequence runs"
