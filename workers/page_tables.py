"""The pages that running sequences hold: taken, sealed, shared, and freed again."""

from __future__ import annotations

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

        This decides how its pages are dealt: by its first tokens, as those that are cached are.
        """
        seq.take_deal(PageDeal.of(self._geometry.kvp, seq.tokens))
        known = seq.digests(max_pages)[:max_pages] if seq.is_findable else ()
        hit = self._cache.match(known)
        self._cache.share(hit)
        seq.hot.update(hit.hot)
        seq.sealed.update(hit.sealed)
        return hit

    def first_missing(self, seq: Sequence, start: int, stop: int) -> Digest | None:
        """The first of a sequence's logical pages [start, stop) that is not cached in any form."""
        known = seq.digests(stop)[start:stop] if seq.is_findable else ()
        return next((digest for digest in known if digest not in self._cache), None)

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
            digest = found = None
            # A page that a pending token fills has no digest yet, so it is sealed for itself.
            if seq.is_findable and page < seq.num_tokens // self._geometry.page_size:
                digest = seq.digests(page + 1)[page]
                found = self._cache.sealed.find(digest)
                if found is None:
                    found = draft.being_sealed(seq, digest)
            rank = seq.deal.rank_of(page)
            if found is not None:
                assert found % seq.deal.kvp == rank, "equal contents are on two ranks"
                seq.sealed[page] = self._cache.sealed.share(found)
            else:
                seq.sealed[page] = self._cache.sealed.take(rank)
                draft.seal(seq, page, digest)
            draft.set_sealed(seq, page)

    def publish(self, seq: Sequence) -> None:
        """Full pages enter the cache as soon as their tokens are known, and outdated hot ones are
        released: steps are computed in order, so a later one may write to them."""
        if seq.num_named == seq.num_computed // self._geometry.page_size:
            return  # no page has become full since
        due = self._geometry.sealed_range(seq.num_computed)
        if seq.is_findable:
            self._name(seq, due.stop)
        for page in [page for page in seq.hot if page in due]:
            near_end = self.ends_near(seq, page)
            self._cache.release_hot(seq.hot.pop(page), seq.num_computed, at_end=near_end)

    def start(self, seq: Sequence) -> None:
        """It begins with the pages of a hit, which have names."""
        seq.num_named = seq.num_computed // self._geometry.page_size
        seq.num_sealed_named = self._geometry.sealed_range(seq.num_computed).stop

    def withdraw(self, seq: Sequence) -> None:
        """Let no other sequence find its pages any more."""
        self._cache.withdraw(seq.digests(self._known_pages(seq)))

    def free(self, seq: Sequence) -> None:
        """Release all of its pages."""
        self.publish(seq)
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

    def ends_near(self, seq: Sequence, page: int) -> bool:
        """Whether the page is at the end of the prompt, where another question about the same
        document is likely to differ."""
        pages = seq.prompt_tokens // self._geometry.page_size
        return pages - min(BLOCK_PAGES, -(-pages // 8)) <= page < pages

    def _known_pages(self, seq: Sequence) -> int:
        """Full pages whose tokens are all known, computed or about to be."""
        return min(seq.num_tokens, seq.num_computed) // self._geometry.page_size

    def _name(self, seq: Sequence, sealed_stop: int) -> None:
        """sealed_stop: pages before it are sealed"""
        num_known = self._known_pages(seq)
        num_sealed = min(sealed_stop, num_known)
        digests = seq.digests(num_known)
        for page in range(seq.num_named, num_known):
            if page in seq.hot:  # not if it was outdated before its last token was known
                self._cache.hot.name(seq.hot[page], digests[page])
            self._note_block(digests, page)
        for page in range(seq.num_sealed_named, num_sealed):
            self._cache.sealed.name(seq.sealed[page], digests[page])
            self._note_block(digests, page)
        seq.num_named = max(seq.num_named, num_known)
        seq.num_sealed_named = max(seq.num_sealed_named, num_sealed)

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
