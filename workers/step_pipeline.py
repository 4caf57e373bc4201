"""Steps on their way from an engine's scheduler to the ranks and back.

    Scheduler.schedule() ──► submit ──► the ranks compute ──► result ──► committed

Where ranks compute by themselves, a step is submitted before the result of the one before is
read, so that they never wait for the engine (docs/adr/0033).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh.workers.blame import Blame
from kvmesh.workers.constrained_outputs import ConstrainedOutputs
from kvmesh.workers.engine_stats import EngineStats
from kvmesh.workers.executor import Executor, MakeMasks
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.scheduler import Scheduler
from kvmesh.workers.step_budget import StepBudget, StepWork
from kvmesh.workers.step_in_flight import StepInFlight


@dataclass(slots=True, eq=False)
class _Submitted:
    """A step that the ranks have.

    work: what it computes
    start_s, submitted_s: when it began to be decided, and when the ranks got it
    masks: once all tokens before it are known, if it needs them
    """

    plan: StepPlan
    work: StepWork
    start_s: float
    submitted_s: float
    masks: MakeMasks | None = None


class StepPipeline:
    """Of one engine. clock: seconds, monotonic; step_budget: learns how long steps take"""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        constrained: ConstrainedOutputs,
        stats: EngineStats,
        step_budget: StepBudget | None,
        clock: Callable[[], float],
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._constrained = constrained
        self._stats = stats
        self._step_budget = step_budget
        self._clock = clock
        self._steps: deque[_Submitted] = deque()  # oldest first, like the scheduler's
        self._computing: tuple[StepInFlight, ...] = ()
        # When the latest result came and was committed, and how long its ranks took.
        self._result_s = self._committed_s = self._ranks_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._steps)

    @property
    def blame(self) -> Blame:
        """For what is computed now, should it fail; of nobody between steps."""
        if not self._computing:
            return Blame()
        return Blame.of([seq for step in self._computing for seq in step.sequences])

    def rest(self) -> None:
        """Nothing that fails from now on does so because of a step."""
        self._computing = ()

    def fill(self, *, alone: bool) -> None:
        """Decide and submit steps until the ranks have all they take, or nothing is to compute.

        alone: one step at a time
        """
        limit = 1 if alone else self._executor.max_in_flight
        while len(self._steps) < limit and self._submit():
            pass

    def result(self) -> tuple[StepPlan, StepResult]:
        """Wait for the oldest step, which is to be committed next."""
        self._computing = tuple(self._scheduler.in_flight)
        step = self._steps[0]
        result = self._executor.result(step.masks)
        assert result.step == step.plan.step, "a rank sent the result of another step"
        # The ranks began with it when they had it, and had computed the one before.
        now = self._clock()
        self._ranks_s = now - max(step.submitted_s, self._result_s)
        self._result_s = now
        if self._step_budget is not None:
            self._step_budget.learn(step.work, self._ranks_s)
        return step.plan, result

    def committed(self, result: StepResult) -> None:
        """Its tokens are known, so the masks of the next step can be made."""
        step = self._steps.popleft()
        if self._steps:
            self._start_masks()
        now = self._clock()
        whole_s = now - max(step.start_s, self._committed_s)
        self._committed_s = now
        self._stats.step_done(step.work, whole_s, self._ranks_s, result)

    def _submit(self) -> bool:
        start_s = self._clock()
        if self._scheduler.schedule() is None:
            return False
        step = self._scheduler.in_flight[-1]
        now = self._clock()
        for seq in step.sequences:
            if seq.started_s is None:
                seq.started_s = now
                self._stats.started(seq)
        plan = self._constrained.masked(step)
        self._steps.append(_Submitted(plan, step.work, start_s, now))
        self._start_masks()
        self._computing = tuple(self._scheduler.in_flight)
        self._executor.submit(plan)
        return True

    def _start_masks(self) -> None:
        """Of the oldest step, if it needs any: the tokens before it are known."""
        oldest = self._steps[0]
        if oldest.plan.masked and oldest.masks is None:
            oldest.masks = self._constrained.start(self._scheduler.in_flight[0])
