"""The choice of a group: a pure function of what is free and what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.cluster.routing.demand import Demand
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.verdict import NEVER, Reason, Verdict
from kvmesh.workers.sizes import PageNeed


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group at the moment of choice.

    used: pages leased; sequences: sequences leased
    """

    spec: GroupSpec
    used: PageNeed
    sequences: int
    up: bool = True
    reported: bool = True

    def free_pages(self) -> PageNeed:
        capacity = self.spec.capacity
        return PageNeed(capacity.hot - self.used.hot, capacity.sealed - self.used.sealed)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group, and what the request would take on it."""

    view: GroupView
    demand: Demand


@dataclass(frozen=True, slots=True)
class Asked:
    """What the request asks of any group."""

    sequences: int = 1
    min_quality: float | None = None
    excluded_groups: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """group: where the request goes, or None; verdicts: one for each candidate, in order."""

    group: str | None
    verdicts: tuple[Verdict, ...]

    @property
    def never(self) -> bool:
        """True if no group could take the request however long it waited."""
        return all(verdict.never for verdict in self.verdicts)


def choose(candidates: Sequence[Candidate], asked: Asked) -> Choice:
    """The group where the request leaves the most bytes free, among those that hold it now."""
    reasons = [obstacle(candidate, asked) for candidate in candidates]
    fitting = [index for index, reason in enumerate(reasons) if reason is None]
    best = max(fitting, key=lambda index: _free_share_after(candidates[index]), default=None)
    verdicts = tuple(
        _verdict(candidate, reason or (Reason.CHOSEN if index == best else Reason.WORSE))
        for index, (candidate, reason) in enumerate(zip(candidates, reasons, strict=True))
    )
    group = None if best is None else candidates[best].view.spec.group
    return Choice(group, verdicts)


def obstacle(candidate: Candidate, asked: Asked) -> Reason | None:
    """Why the group cannot take the request now, or None if it can."""
    view, demand, spec = candidate.view, candidate.demand, candidate.view.spec
    if asked.min_quality is not None and spec.quality < asked.min_quality:
        return Reason.QUALITY
    if demand.total_tokens > spec.max_model_len:
        return Reason.CONTEXT
    if asked.sequences > spec.max_sequences:
        return Reason.SEQUENCES
    if not demand.most.fits(spec.capacity):
        return Reason.PAGES
    if spec.group in asked.excluded_groups:
        return Reason.EXCLUDED
    if not view.up:
        return Reason.DOWN
    if not view.reported:
        return Reason.UNREPORTED
    if view.sequences + asked.sequences > spec.max_sequences:
        return Reason.BUSY
    if not demand.leased.fits(view.free_pages()):
        return Reason.FULL
    return None


def _free_share_after(candidate: Candidate) -> float:
    """The scarcer of hot and sealed pages, as the share still free with the request in."""
    free, leased = candidate.view.free_pages(), candidate.demand.leased
    capacity = candidate.view.spec.capacity
    hot = (free.hot - leased.hot) / max(capacity.hot, 1)
    sealed = (free.sealed - leased.sealed) / max(capacity.sealed, 1)
    return min(hot, sealed)


def _verdict(candidate: Candidate, reason: Reason) -> Verdict:
    spec, free = candidate.view.spec, candidate.view.free_pages()
    needed = candidate.demand.most if reason in NEVER else candidate.demand.leased
    room = spec.capacity if reason in NEVER else PageNeed(max(free.hot, 0), max(free.sealed, 0))
    return Verdict(
        group=spec.group,
        reason=reason,
        needed_bytes=spec.geometry.bytes_of(needed),
        available_bytes=spec.geometry.bytes_of(room),
        capacity_bytes=spec.capacity_bytes,
    )
