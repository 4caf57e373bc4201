"""A step on its way through a rank's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvmesh.workers.plan import StepPlan, TokenScores
from kvmesh.workers.sampler import SampledRows, Sampling


@dataclass(slots=True, eq=False)
class LaunchedStep:
    """The model is launched; its tokens may be sampled, and are not read yet.

    host_s: time that preparing it took before the model ran
    logits: [n, vocab_size] until they are sampled, valid until the next step; rows: [n] of the
        block tables; None for a step that samples nothing, and on ranks that do not sample
    """

    plan: StepPlan
    host_s: float
    scores: list[TokenScores]
    rows: torch.Tensor
    logits: torch.Tensor | None = None
    sampling: Sampling | None = None
    sampled: SampledRows | None = None
