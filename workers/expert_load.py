"""How evenly a model's experts are used."""

from __future__ import annotations

from kvmesh.workers.model.load import ServedModel

# Reading the counts waits for the device.
PERIOD_STEPS = 64


class ExpertLoad:
    """Of one rank, from now on. Every rank sees all tokens, so one of a group is enough."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._seen = model.expert_tokens()
        self._steps = 0

    def after_step(self) -> float | None:
        """Once in PERIOD_STEPS steps: the busiest expert's tokens in these steps relative to the
        mean of its layer's experts, averaged over layers. 1 if all got as many; None otherwise,
        and for a model without experts."""
        self._steps += 1
        if self._steps % PERIOD_STEPS:
            return None
        counts = self._model.expert_tokens()
        if counts is None or self._seen is None:
            return None
        since, self._seen = counts - self._seen, counts
        mean = since.double().mean(-1)
        if not mean.any():
            return None
        return float((since.amax(-1) / mean).mean())
