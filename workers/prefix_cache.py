"""Finds the pages of earlier sequences that a new prompt can reuse.

A page's digest covers all tokens up to its end (and the salt), so equal digests mean
equal contents: hash(parent digest, tokens of the page). A page may be cached in its sealed
form, in its hot form (needed only where windows are read exactly), or both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from kvmesh.workers.dealt_arena import DealtArena
from kvmesh.workers.request import TokenIds
from kvmesh.workers.sizes import PageGeometry

Digest = bytes

# At this context a token costs as much in attention as in all matrix products: 2 · weights FLOPs
# against 4 · layers · heads · head_dim for each token before it, 27,000 to 31,000 tokens for models
# of 7 to 8 billion weights.
ATTENTION_TOKENS = 1 << 15


class PageDigests:
    """The digests of a growing sequence's full pages, each computed once."""

    def __init__(self, page_size: int, salt: str) -> None:
        self._page_size = page_size
        self._last = hashlib.blake2b(salt.encode(), digest_size=16).digest()
        self._digests: list[Digest] = []

    def upto(self, tokens: TokenIds, num_pages: int) -> list[Digest]:
        """Digests of the first `num_pages` pages of `tokens` ([>= num_pages·page_size] int32)."""
        first = len(self._digests) * self._page_size
        new = np.ascontiguousarray(tokens[first : num_pages * self._page_size], dtype=np.int32)
        bytes_of_page = 4 * self._page_size
        contents = new.data.cast("B")
        for start in range(0, len(contents), bytes_of_page):
            digest = hashlib.blake2b(self._last, digest_size=16)
            digest.update(contents[start : start + bytes_of_page])
            self._last = digest.digest()
            self._digests.append(self._last)
        return self._digests


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Pages to share: the first `num_pages` logical pages, in the forms that will be read."""

    num_pages: int
    hot: dict[int, int]
    sealed: dict[int, int]


class PrefixCache:
    """Both arenas of a pool, whose pages are named by their digests.

    hot: keeps pages only where windows are read exactly; no sequence could use them elsewhere
    """

    def __init__(self, geometry: PageGeometry, hot_total: int, sealed_total: int, enabled: bool):
        self._geometry = geometry
        self.enabled = enabled
        self._blocks: set[Digest] = set()
        self._changes: dict[Digest, bool] = {}
        exact = geometry.sink_pages + geometry.recent_pages > 0
        kvp, forget = geometry.kvp, self._forget
        self.hot = DealtArena(hot_total, kvp, forget, keeps=enabled and exact)
        self.sealed = DealtArena(sealed_total, kvp, forget, keeps=enabled)

    def __contains__(self, digest: Digest) -> bool:
        """Whether the page can be found in any form."""
        return self.sealed.find(digest) is not None or self.hot.find(digest) is not None

    def note_block(self, digest: Digest) -> None:
        """The page ends a block of its prompt: report it to the router while it is cached."""
        if digest in self and digest not in self._blocks:
            self._blocks.add(digest)
            self._changes[digest] = True

    def withdraw(self, digests: Iterable[Digest]) -> None:
        """Let no other sequence find these pages; those that hold them keep them."""
        for digest in digests:
            self.hot.unname(digest)
            self.sealed.unname(digest)

    def take_changes(self) -> dict[Digest, bool]:
        """Block ends -> whether they are cached, for those that changed since the last call."""
        changes, self._changes = self._changes, {}
        return changes

    def match(self, digests: Seq[Digest]) -> PrefixHit:
        """The longest usable prefix of n pages: the query page after it reads pages [0, sink) and
        [n − recent, n) exactly, the others sealed. Does not share the pages yet."""
        sink, recent = self._geometry.sink_pages, self._geometry.recent_pages
        best = 0
        hot_run = 0  # consecutive hot pages that end here
        sealed_run = sink  # pages [sink, sealed_run) exist in sealed form
        hot: list[int | None] = []
        sealed: list[int | None] = []
        for page, digest in enumerate(digests):
            hot.append(self.hot.find(digest))
            sealed.append(self.sealed.find(digest))
            is_hot = hot[page] is not None
            hot_run = hot_run + 1 if is_hot else 0
            if page < sink and not is_hot:
                break
            if page == sealed_run and sealed[page] is not None:
                sealed_run += 1
            length = page + 1
            if length - recent <= sealed_run and hot_run >= min(recent, max(0, length - sink)):
                best = length
            elif sealed_run + recent < length:
                break
        first_recent = max(sink, best - recent)
        exact = [*range(min(sink, best)), *range(first_recent, best)]
        return PrefixHit(best, _present(hot, exact), _present(sealed, range(sink, first_recent)))

    def share(self, hit: PrefixHit) -> None:
        for page in hit.hot.values():
            self.hot.share(page)
        for page in hit.sealed.values():
            self.sealed.share(page)

    def unshare(self, hit: PrefixHit) -> None:
        """Undo `share`; last pages first, as in a release."""
        for page in reversed(hit.hot.values()):
            self.hot.unshare(page)
        for page in reversed(hit.sealed.values()):
            self.sealed.unshare(page)

    def release_hot(self, page: int, num_tokens: int, *, at_end: bool) -> None:
        """Remove a holder, which has computed `num_tokens`: all of these would have to be computed
        again by a prompt that continues from there, if the exact pages that it reads were lost.

        at_end: of what its sequence has in common with others, as far as can be foreseen; a page
            in the middle is worth keeping only if others were found to end there
        """
        worth_it = at_end or self.hot.was_shared(page)
        self.hot.release(page, num_tokens if worth_it else 0.0)

    def release_sealed(self, page: int, num_tokens: int) -> None:
        """Remove a holder, which has computed `num_tokens`: the mean cost of a page of these."""
        self.sealed.release(page, 1.0 + 0.5 * num_tokens / ATTENTION_TOKENS)

    def check(self) -> None:
        """Audit: the named pages of both arenas are found, and only blocks of these reported."""
        self.hot.check()
        self.sealed.check()
        assert all(block in self for block in self._blocks), "a block is reported, but not cached"

    def _forget(self, digest: Digest) -> None:
        if digest in self._blocks and digest not in self:
            self._blocks.remove(digest)
            self._changes[digest] = False


def _present(pages: Seq[int | None], wanted: Iterable[int]) -> dict[int, int]:
    found = {page: pages[page] for page in wanted}
    return {page: page_id for page, page_id in found.items() if page_id is not None}
