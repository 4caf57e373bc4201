"""A step that the ranks have been given, and whose result has not been read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvmesh.workers.plan import Chunk, StepPlan
from kvmesh.workers.sequence import HeldPages, Sequence
from kvmesh.workers.step_budget import StepWork


@dataclass(frozen=True, slots=True)
class Aboard:
    """A sequence of a step, with its chunk.

    held: its pages during the step; None if it has got none since the step before
    """

    seq: Sequence
    chunk: Chunk
    held: HeldPages | None


@dataclass(slots=True, eq=False)
class StepInFlight:
    """aboard: in the order of the plan's chunks; None in place of a sequence that has ended, or
    will be computed again, so that what the step computes for it is of no use"""

    plan: StepPlan
    work: StepWork
    aboard: list[Aboard | None]

    def forget(self, seq: Sequence) -> None:
        self.aboard = [None if x is not None and x.seq is seq else x for x in self.aboard]

    @property
    def sequences(self) -> Iterator[Sequence]:
        return (x.seq for x in self.aboard if x is not None)

    @property
    def sampled(self) -> list[Sequence | None]:
        """One for each token that the step samples."""
        return [
            None if x is None else x.seq
            for chunk, x in zip(self.plan.chunks, self.aboard, strict=True)
            if chunk.sample
        ]
