"""Conditions that must not change greedy output, for any engine configuration."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import numpy as np

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.executor import Executor
from kvmesh.workers.local import local_executor
from kvmesh.workers.request import EngineRequest, SampledLogprobs, SequenceDelta
from kvmesh.workers.sampling_params import SamplingParams

INVARIANT_TOKENS = 40

# Logits of one token, computed in products of other shapes, were measured to differ by about 1e-4
# with fp32 weights; then a sealed code sometimes differs by a step, which moves logits by 1e-2.
NOISE = 0.05


def generate(
    engine: Engine, prompts: list[list[int]], max_tokens: int
) -> list[list[SequenceDelta]]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=2)
    for index, prompt in enumerate(prompts):
        ids = np.array(prompt, np.int32)
        engine.add(EngineRequest(str(index), ids, params))
    deltas: dict[str, list[SequenceDelta]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    engine.check_integrity()
    return list(deltas.values())


def tokens_of(deltas: list[SequenceDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


class Invariance:
    """Outputs of one configuration, compared with the same prompts run one by one."""

    def __init__(
        self, config: EngineConfig, prompts: list[list[int]], max_tokens: int = INVARIANT_TOKENS
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.make_executor: Callable[[EngineConfig], Executor] = local_executor
        self.alone = self.one_by_one(self.make_engine())

    def under(
        self, make_executor: Callable[[EngineConfig], Executor], **changes: object
    ) -> Invariance:
        """The same expected outputs, for engines of another configuration."""
        other = copy(self)
        other.config = self.config.replace(**changes)
        other.make_executor = make_executor
        return other

    def make_engine(self) -> Engine:
        return Engine(self.config, self.make_executor(self.config))

    def one_by_one(self, engine: Engine) -> list[list[SequenceDelta]]:
        return [generate(engine, [prompt], self.max_tokens)[0] for prompt in self.prompts]

    def preempted(self, steps: tuple[int, ...]) -> list[list[SequenceDelta]]:
        """All prompts at once; before each of `steps` the two youngest are preempted."""
        engine = self.make_engine()
        params = SamplingParams(temperature=0.0, max_tokens=self.max_tokens, logprobs=2)
        deltas: dict[str, list[SequenceDelta]] = {}
        for index, prompt in enumerate(self.prompts):
            ids = np.array(prompt, np.int32)
            engine.add(EngineRequest(str(index), ids, params))
            deltas[str(index)] = []
        step = 0
        while engine.has_work:
            if step in steps:
                engine.scheduler.preempt_youngest()
                engine.scheduler.preempt_youngest()
            for delta in engine.step():
                deltas[delta.request_id].append(delta)
            step += 1
        usages = [d[-1].usage for d in deltas.values()]
        assert sum(u.preemptions for u in usages if u) == 2 * len(steps)
        return list(deltas.values())

    def check(self, outputs: list[list[SequenceDelta]]) -> None:
        """Equal, except for a rare token whose runner-up's logit lies within the noise."""
        differing = 0
        for alone, other in zip(self.alone, outputs, strict=True):
            pairs = list(zip(_flat(alone), _flat(other), strict=False))
            at = next((i for i, (a, b) in enumerate(pairs) if a[0] != b[0]), None)
            if at is None:
                assert len(_flat(alone)) == len(_flat(other))
                continue
            differing += 1
            for _, logprobs in pairs[at]:
                (_, best), (_, second) = logprobs.top
                assert best - second < NOISE, f"token {at} differs by more than noise"
        assert differing <= 1


def _flat(deltas: list[SequenceDelta]) -> list[tuple[int, SampledLogprobs]]:
    return [pair for delta in deltas for pair in zip(delta.token_ids, delta.logprobs, strict=True)]
