"""The steps that a rank has been given and has not answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from kvmesh.workers.launched_step import LaunchedStep
from kvmesh.workers.plan import StepPlan, StepResult, TokenMasks


class StepRunner(Protocol):
    """What computes them: ModelRunner."""

    def launch(self, plan: StepPlan) -> LaunchedStep: ...

    def sample(self, step: LaunchedStep, masks: TokenMasks | None = None) -> None: ...

    def result(self, step: LaunchedStep) -> StepResult | None: ...


class RankSteps:
    """Launches each step as soon as the one before has been sampled.

    samples: whether this rank does; then a masked step waits for its masks
    """

    def __init__(self, runner: StepRunner, *, samples: bool) -> None:
        self._runner = runner
        self._samples = samples
        self._waiting: deque[StepPlan] = deque()
        self._unsampled: LaunchedStep | None = None
        self._sampled: deque[LaunchedStep] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._waiting.append(plan)
        self._launch()

    def mask(self, masks: TokenMasks) -> None:
        """The masks of the oldest masked step."""
        step, self._unsampled = self._unsampled, None
        assert step is not None and step.plan.step == masks.step, "masks must follow a masked plan"
        self._sample(step, masks)
        self._launch()

    def result(self) -> StepResult | None:
        """Wait for the oldest one, which has been sampled; None on ranks that do not sample."""
        return self._runner.result(self._sampled.popleft())

    def results(self, keep: int = 0) -> Iterator[StepResult]:
        """Wait for all that are sampled, except for the `keep` that were launched last."""
        while self._sampled and len(self._sampled) + (self._unsampled is not None) > keep:
            if (result := self.result()) is not None:
                yield result

    def _launch(self) -> None:
        while self._waiting and self._unsampled is None:
            step = self._runner.launch(self._waiting.popleft())
            if step.plan.masked and self._samples:
                self._unsampled = step
            else:
                self._sample(step, None)

    def _sample(self, step: LaunchedStep, masks: TokenMasks | None) -> None:
        self._runner.sample(step, masks)
        self._sampled.append(step)
