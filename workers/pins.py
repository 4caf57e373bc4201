"""Prompts that stay cached for a time, because their owners have asked for it.

A pin holds the digests of a prompt's full pages. Pages with these digests are evicted after all
others, whenever they are computed, and wherever they lie. So a pin is a promise about the order of
eviction and reserves nothing: what sequences may hold, and what the router's ledger counts, does
not depend on pins. Running sequences take pinned pages when nothing else is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from kvmesh.workers.deadlines import Deadlines
from kvmesh.workers.prefix_cache import Digest, PrefixCache
from kvmesh.workers.sizes import PageNeed


@dataclass(frozen=True, slots=True)
class PinBounds:
    """The most pages, over all ranks that share a sequence's, that all pins may hold together, and
    those of one owner."""

    group: PageNeed
    owner: PageNeed

    @classmethod
    def of(cls, hot: int, sealed: int, share: float, owner_share: float) -> PinBounds:
        """hot, sealed: all pages that there are"""
        group, own = (
            PageNeed(int(hot * part), int(sealed * part)) for part in (share, owner_share)
        )
        return cls(group, PageNeed(min(own.hot, group.hot), min(own.sealed, group.sealed)))


@dataclass(frozen=True, slots=True)
class _Pin:
    """digests: of a prompt's full pages; exact: of those whose exact form is kept as well"""

    digests: Sequence[Digest]
    exact: Sequence[Digest]
    until_s: float

    def ends_for(self, longer: Sequence[Digest], until_s: float) -> bool:
        """Whether it holds the beginning of another prompt, and not for longer."""
        count = len(self.digests)
        begins = count < len(longer) and longer[count - 1] == self.digests[-1]
        return begins and self.until_s <= until_s


@dataclass(slots=True)
class _Owned:
    """How many of an owner's pins hold each digest, and each exact form."""

    sealed: Counter[Digest] = field(default_factory=Counter)
    hot: Counter[Digest] = field(default_factory=Counter)
    pins: dict[str, _Pin] = field(default_factory=dict)

    @property
    def pages(self) -> PageNeed:
        return PageNeed(len(self.hot), len(self.sealed))


class Pins:
    """All pins of an engine. Times are seconds of one clock."""

    def __init__(self, cache: PrefixCache, bounds: PinBounds) -> None:
        self._cache = cache
        self._bounds = bounds
        self._owners: dict[str, _Owned] = {}
        self._expiries = Deadlines()

    @property
    def pages(self) -> PageNeed:
        """That pins hold, over all ranks; a prompt's pages count as sealed, the exact ones of its
        first and last tokens as hot, too."""
        return sum((owned.pages for owned in self._owners.values()), PageNeed(0, 0))

    def hold(
        self, owner: str, digests: Sequence[Digest], exact: Sequence[Digest], until_s: float
    ) -> bool:
        """Keep a prompt until then; the same prompt's pin gets this time in place of its own.

        Of the owner's pins, those end that hold the beginning of this one, and not for longer.
        Returns False, and changes nothing, if it would exceed a bound.
        """
        name = _name(owner, digests[-1])
        owned = self._owners.get(owner, _Owned())
        shorter = [x for x, pin in owned.pins.items() if pin.ends_for(digests, until_s)]
        if name in owned.pins:
            owned.pins[name] = replace(owned.pins[name], until_s=until_s)
        else:
            others = [pin for x, pin in owned.pins.items() if x not in shorter]
            wanted = PageNeed(
                len({*exact}.union(*(pin.exact for pin in others))),
                len({*digests}.union(*(pin.digests for pin in others))),
            )
            if not wanted.fits(self._bounds.owner):
                return False
            if not (self.pages - owned.pages + wanted).fits(self._bounds.group):
                return False
            self._owners[owner] = owned
            owned.pins[name] = _Pin(digests, exact, until_s)
            self._enter(owned, digests, exact)
        self._expiries.add(name, until_s)
        for other in shorter:
            self._end(owner, other)
        return True

    def end(self, owner: str, last: Digest) -> None:
        """End the owner's pin of a prompt, if there is one. last: digest of its last page"""
        name = _name(owner, last)
        if name in self._owners.get(owner, _Owned()).pins:
            self._end(owner, name)

    def expire(self, now: float) -> None:
        """End the pins whose time is over."""
        for name in self._expiries.take_due(now):
            self._end(_owner(name), name)

    def left_s(self, now: float) -> float | None:
        """Until the next pin expires; None without any."""
        return self._expiries.left_s(now)

    def check(self) -> None:
        """Audit: bounds are kept, and exactly the pages of pins are pinned."""
        assert self.pages.fits(self._bounds.group), f"{self.pages} are pinned, too many"
        hot: set[Digest] = set()
        sealed: set[Digest] = set()
        for owned in self._owners.values():
            assert owned.pins and owned.pages.fits(self._bounds.owner)
            for kept, part in ((owned.hot, "exact"), (owned.sealed, "digests")):
                held = Counter(d for pin in owned.pins.values() for d in getattr(pin, part))
                assert kept == held, "a page is held by more or fewer pins than it is counted for"
            hot |= owned.hot.keys()
            sealed |= owned.sealed.keys()
        assert self._cache.hot.pinned.keys() == hot, "not the exact pages of pins are pinned"
        assert self._cache.sealed.pinned.keys() == sealed, "not the pages of pins are pinned"

    def _enter(self, owned: _Owned, digests: Iterable[Digest], exact: Iterable[Digest]) -> None:
        for digest in digests:
            owned.sealed[digest] += 1
            if owned.sealed[digest] == 1:
                self._cache.sealed.pin(digest)
        for digest in exact:
            owned.hot[digest] += 1
            if owned.hot[digest] == 1:
                self._cache.hot.pin(digest)

    def _end(self, owner: str, name: str) -> None:
        owned = self._owners[owner]
        pin = owned.pins.pop(name)
        self._expiries.remove(name)
        # Last pages first, as in a release: they are then evicted first.
        for digest in reversed(pin.digests):
            owned.sealed[digest] -= 1
            if not owned.sealed[digest]:
                del owned.sealed[digest]
                self._cache.sealed.unpin(digest)
        for digest in reversed(pin.exact):
            owned.hot[digest] -= 1
            if not owned.hot[digest]:
                del owned.hot[digest]
                self._cache.hot.unpin(digest)
        if not owned.pins:
            del self._owners[owner]


def _name(owner: str, last: Digest) -> str:
    return f"{last.hex()}/{owner}"


def _owner(name: str) -> str:
    return name.partition("/")[2]
