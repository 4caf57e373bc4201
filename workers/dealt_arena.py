"""The arenas of the kvp ranks to which pages are dealt, as one. With kvp = 1 it is an arena."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from kvmesh.workers.arena import Arena, Key


class DealtArena:
    """Page ids name a rank and a page of its arena, see deal.py. Finds named pages.

    total: pages of one rank; all have as many
    on_forget: called with a key once its page is no longer found
    keeps: whether pages can be named at all
    parts: each rank's arena
    pinned: keys whose pages are evicted after all others, and how often each was pinned
    """

    def __init__(
        self, total: int, kvp: int, on_forget: Callable[[Key], None], *, keeps: bool
    ) -> None:
        self.total = total
        self.kvp = kvp
        self._keeps = keeps
        self._on_forget = on_forget
        self._pages: dict[Key, int] = {}
        self.pinned: Counter[Key] = Counter()
        self.parts = tuple(Arena(total, self._forget, self.pinned) for _ in range(kvp))

    @property
    def used(self) -> int:
        """Pages of all ranks together."""
        return sum(part.used for part in self.parts)

    @property
    def cached(self) -> int:
        """Pages of all ranks together."""
        return sum(part.cached for part in self.parts)

    @property
    def available(self) -> list[int]:
        """How many pages `take` can return for each rank."""
        return [part.available for part in self.parts]

    @property
    def pinned_evictions(self) -> int:
        """Of all ranks together: pages that were evicted though they were pinned."""
        return sum(part.pinned_evictions for part in self.parts)

    @property
    def fullest(self) -> Arena:
        """The arena in which most pages are used."""
        return max(self.parts, key=lambda part: part.used)

    def take(self, rank: int) -> int:
        """See Arena.take."""
        return self.parts[rank].take() * self.kvp + rank

    def find(self, key: Key) -> int | None:
        """The used or cached page of that name."""
        return self._pages.get(key)

    def name(self, page: int, key: Key) -> None:
        """Keep a used page under `key`, unless another has that name; see Arena.name."""
        if self._keeps and key not in self._pages:
            self._pages[key] = page
            self._part(page).name(page // self.kvp, key)

    def unname(self, key: Key) -> None:
        """Let nobody else find the page of that name, if there is one."""
        if (page := self._pages.get(key)) is not None:
            self._part(page).unname(page // self.kvp)

    def share(self, page: int) -> int:
        """See Arena.share."""
        self._part(page).share(page // self.kvp)
        return page

    def unshare(self, page: int) -> None:
        """See Arena.unshare."""
        self._part(page).unshare(page // self.kvp)

    def release(self, page: int, worth: float) -> None:
        """See Arena.release."""
        self._part(page).release(page // self.kvp, worth)

    def pin(self, key: Key) -> None:
        """Evict the page of this name last, once there is one."""
        self.pinned[key] += 1
        self._rerank(key)

    def unpin(self, key: Key) -> None:
        """Undo `pin`."""
        self.pinned[key] -= 1
        if not self.pinned[key]:
            del self.pinned[key]
        self._rerank(key)

    def was_shared(self, page: int) -> bool:
        """See Arena.was_shared."""
        return self._part(page).was_shared(page // self.kvp)

    @property
    def named(self) -> Mapping[Key, int]:
        """The pages that are found, by name."""
        return self._pages

    def check(self) -> None:
        """Audit every rank's arena, and that exactly the named pages are found."""
        for part in self.parts:
            part.check()
        named = {
            page * self.kvp + rank: key
            for rank, part in enumerate(self.parts)
            for key, page in part.named.items()
        }
        assert named == {page: key for key, page in self._pages.items()}, "a page cannot be found"

    def _forget(self, key: Key) -> None:
        del self._pages[key]
        self._on_forget(key)

    def _rerank(self, key: Key) -> None:
        if (page := self._pages.get(key)) is not None:
            self._part(page).rerank(page // self.kvp)

    def _part(self, page: int) -> Arena:
        return self.parts[page % self.kvp]
