"""The sequences whose outputs have to match a grammar, or to stay within a limit."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait

import msgspec

from kvmesh.workers.executor import MakeMasks, RankDescription
from kvmesh.workers.plan import StepPlan
from kvmesh.workers.sequence import Sequence
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
        self._preparing.pop(seq, None)

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

    def masked(
        self, plan: StepPlan, aboard: Mapping[int, Sequence]
    ) -> tuple[StepPlan, MakeMasks | None]:
        """The plan, and the masks that its ranks need, which are made from now on.

        aboard: the plan's sequences, by their rows
        """
        if not any(seq.output_state is not None for seq in aboard.values()):
            return plan, None
        sampled = (aboard[chunk.row].output_state for chunk in plan.chunks if chunk.sample)
        states = [
            (position, state)
            for position, state in enumerate(sampled)
            if state is not None and state.needs_mask
        ]
        if not states:
            return plan, None
        masks = self._masks.start(plan.step, states)
        return msgspec.structs.replace(plan, masked=True), masks.result
