"""The engines that a request has lost, and whether it may be placed again."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvmesh.cluster.errors import EngineLostError, RequestFaultError
from kvmesh.workers.request import EndReason

MAX_FAILOVERS = 3


class Loss(enum.IntEnum):
    """How a request has lost its engine; of several sequences, the highest counts."""

    REFUSED = 0  # before the engine had it
    CLEARED = 1  # the engine failed for another reason
    SUSPECT = 2  # the engine failed, perhaps because of the request


LOSSES = {EndReason.CLEARED: Loss.CLEARED, EndReason.ERROR: Loss.SUSPECT}


@dataclass(slots=True)
class Failovers:
    """What a request has lost so far.

    engines: epochs of the lost engines
    total: how many
    suspicion: how many failed perhaps because of the request
    in_vain: since its latest token, except those that failed for another reason
    ran: some had it
    """

    engines: frozenset[str] = frozenset()
    total: int = 0
    suspicion: int = 0
    in_vain: int = 0
    ran: bool = False
    _tokens: int = 0
    _suspect_in_vain: int = 0

    def note(self, epoch: str, loss: Loss, tokens: int) -> None:
        """An engine is lost. Raises RequestFaultError or EngineLostError if that is enough.

        tokens: that the request has, of all choices
        """
        self.engines |= {epoch}
        self.total += 1
        if tokens > self._tokens:
            self.in_vain = self._suspect_in_vain = 0
        self._tokens = tokens
        self.ran |= loss is not Loss.REFUSED
        self.suspicion += loss is Loss.SUSPECT
        self._suspect_in_vain += loss is Loss.SUSPECT
        self.in_vain += loss is not Loss.CLEARED
        if self.in_vain <= MAX_FAILOVERS:
            return
        if self._suspect_in_vain:
            raise RequestFaultError(
                f"{self.in_vain} engines in a row were lost, "
                f"{self._suspect_in_vain} of them while they had it"
            )
        raise EngineLostError()
