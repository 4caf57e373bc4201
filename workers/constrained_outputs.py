"""The sequences whose outputs have to match a grammar, or to stay within a limit."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait

import msgspec

from kvmesh.workers.executor import MakeMasks, RankDescription
from kvmesh.workers.plan import StepPlan
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.step_in_flight import StepInFlight
from kvmesh.workers.structured.grammars import Grammars
from kvmesh.workers.structured.masks import MaskMaker
from kvmesh.workers.structured.state import OutputState

MAX_WAIT_S = 0.05  # an idle engine looks for commands while it waits for a grammar


class ConstrainedOutputs:
    """Of one engine, which calls this between two steps."""

    def __init__(self, rank: RankDescription) -> None:
        self._grammars = Grammars(rank)
        self._masks = MaskMaker(rank.vocab_size)
        self._preparing: dict[Sequence, Future[OutputState]] = {}

    def add(self, seq: Sequence) -> None:
        """Compile what a new sequence needs, if it needs anything; it can run after that."""
        if (constraint := seq.request.constraint) is not None:
            output = seq.tokens[seq.prompt_tokens :].tolist()
            self._preparing[seq] = self._grammars.prepare(constraint, output)

    def remove(self, seq: Sequence) -> None:
        if (found := self._preparing.pop(seq, None)) is not None:
            found.cancel()  # others need not wait until it is compiled

    @property
    def preparing(self) -> bool:
        """Whether some sequences cannot run yet."""
        return bool(self._preparing)

    def wait(self) -> None:
        """Until one of them can run, but not for long."""
        wait(self._preparing.values(), MAX_WAIT_S, FIRST_COMPLETED)

    def take_prepared(self) -> list[tuple[Sequence, str]]:
        """Let those run that can; returns those that never can, and why."""
        failed = []
        for seq in [seq for seq, found in self._preparing.items() if found.done()]:
            found = self._preparing.pop(seq)
            if (error := found.exception()) is not None:
                failed.append((seq, str(error)))
            else:
                seq.output_state = found.result()
                seq.prepared = True
        return failed

    def masked(self, step: StepInFlight) -> StepPlan:
        """The plan, which says whether masks follow it: also where that depends on tokens which
        are not known yet."""
        for seq in step.sampled:
            if seq is None or (state := seq.output_state) is None:
                continue
            if state.needs_mask or seq.pending > 1:
                return msgspec.structs.replace(step.plan, masked=True)
        return step.plan

    def start(self, step: StepInFlight) -> MakeMasks:
        """The masks of a masked step, which are made from now on: all earlier tokens are known."""
        states = [
            (position, seq.output_state)
            for position, seq in enumerate(step.sampled)
            if seq is not None and seq.output_state is not None and seq.output_state.needs_mask
        ]
        return self._masks.start(step.plan.step, states).result
