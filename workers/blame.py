"""Which sequences may have made an engine fail.

A step that fails says nothing about its cause, and all of its sequences are suspects. Wherever
they are placed next, at most one suspect that has not proved itself with a token is computed per
step (`Scheduler.schedule`), so that a second failure has one possible culprit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvmesh.workers.errors import RankRaisedError, WorkerDiedError
from kvmesh.workers.request import EndReason
from kvmesh.workers.sequence import Sequence

# Processes also die by chance: an operator's or the kernel's kill, a host that fails. An error
# that a step raises, on the other hand, is raised again by the same step.
MAX_CHANCE_DEATHS = 2


@dataclass(frozen=True, slots=True)
class Blame:
    """How every sequence ends if one of the steps fails that are computed now.

    aboard: ids of their sequences; None between steps, when nobody knows
    on_trial: the suspect among them that has not proved itself, if there is one
    suspicion: of the one on trial
    """

    aboard: frozenset[str] | None = None
    on_trial: str | None = None
    suspicion: int = 0

    @staticmethod
    def of(sequences: Collection[Sequence]) -> Blame:
        """The blame for steps of these sequences, at most one of which is on trial: steps that
        could have one are computed alone."""
        tried = next((seq.request for seq in sequences if seq.on_trial), None)
        aboard = frozenset(seq.request.request_id for seq in sequences)
        return Blame(aboard) if tried is None else Blame(aboard, tried.request_id, tried.suspicion)

    def culprit(self, error: Exception) -> str | None:
        """The sequence that has made a second engine fail."""
        raised = isinstance(error, RankRaisedError) or not isinstance(error, WorkerDiedError)
        convicted = raised or self.suspicion >= MAX_CHANCE_DEATHS
        return self.on_trial if convicted else None

    def end_of(self, request_id: str, error: Exception) -> EndReason:
        if self.aboard is None:
            return EndReason.ERROR
        if request_id == self.culprit(error):
            return EndReason.FAULT
        if self.on_trial is not None:
            return EndReason.ERROR if request_id == self.on_trial else EndReason.CLEARED
        return EndReason.ERROR if request_id in self.aboard else EndReason.CLEARED
