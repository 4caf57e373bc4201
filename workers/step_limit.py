"""How long a step may take before its ranks count as hung.

A step's time is a + b · tokens + c · reads, where a, b, c ≥ 0 are not known, and reads are the
tokens that each of its tokens attends to. So a step that took t seconds bounds any other step:

    t · max(1, tokens / tokens of that step, reads / reads of that step)

A limit is a multiple of this bound, for noisy machines, and no lower than a floor. Kernels are
compiled for sizes: the first steps of a kind have more time.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.workers.plan import StepPlan

DEFAULT_STEP_TIMEOUT_S = 10.0
SLACK = 20.0
# A step of a new kind may take this many times the floor, depending on what is known.
MIN_NEW, MAX_NEW = 12.0, 60.0
FADE = 0.99  # of the slowest step's time, with each further step of its kind

# Bits of the longest chunk and of the context, and whether pages are sealed.
_Kind = tuple[int, int, bool]


@dataclass(frozen=True, slots=True)
class _Taken:
    """A step and its time. first: of its kind, so that it may have compiled"""

    seconds: float
    tokens: int
    reads: int
    first: bool = False

    def bound_s(self, tokens: int, reads: int) -> float:
        return self.seconds * max(1.0, tokens / self.tokens, reads / self.reads)


class StepLimit:
    """Learns from the steps of one engine.

    floor_s: no limit is lower
    """

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._slowest: dict[_Kind, _Taken] = {}

    def of(self, plan: StepPlan) -> float:
        """The limit of this step, in seconds."""
        kind, tokens, reads = _size(plan)
        same_kind = self._slowest.get(kind)
        if same_kind is not None and not same_kind.first:
            return max(self._floor_s, SLACK * same_kind.bound_s(tokens, reads))
        bounds = [taken.bound_s(tokens, reads) for taken in self._slowest.values()]
        limit_s = SLACK * min(bounds, default=float("inf"))
        # The bound is far too high for a step unlike all others: cap it.
        slowest_s = max((taken.seconds for taken in self._slowest.values()), default=0.0)
        cap_s = max(MAX_NEW * self._floor_s, SLACK * slowest_s)
        return min(max(limit_s, MIN_NEW * self._floor_s), cap_s)

    def learn(self, plan: StepPlan, seconds: float) -> None:
        """The step was executed in this time."""
        kind, tokens, reads = _size(plan)
        before = self._slowest.get(kind)
        taken = _Taken(seconds, tokens, reads, first=before is None)
        if before is not None and not before.first:
            faded = _Taken(before.seconds * FADE, before.tokens, before.reads)
            if seconds <= faded.bound_s(tokens, reads):
                taken = faded
        self._slowest[kind] = taken


def _size(plan: StepPlan) -> tuple[_Kind, int, int]:
    """Its kind, tokens and reads, in one pass: the engine waits for this in every step."""
    tokens = reads = longest = context = 0
    for chunk in plan.chunks:
        count = chunk.num_tokens
        end = chunk.start + count
        tokens += count
        reads += count * end
        longest, context = max(longest, count), max(context, end)
    return (longest.bit_length(), context.bit_length(), bool(plan.seal_hot)), tokens, reads
