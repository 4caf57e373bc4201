"""Ranks that answer at once, or after a given time, without a model."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from benchmarks.control_plane.tokens import FIRST_ID, NUM_IDS, successor
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.config import DEFAULT_CPU_KV_MEMORY_BYTES, EngineConfig
from kvmesh.workers.executor import Allocation, RankDescription
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult

if TYPE_CHECKING:  # older checkouts have no masks
    from kvmesh.workers.executor import MakeMasks

PAGE_BYTES = 1024  # no page exists, so any size will do
# A round trip to a real rank takes about this long, during which the engine's thread does not
# hold the GIL. An executor that never released it would starve the leader's event loop.
MIN_STEP_S = 1e-4


class InstantExecutor:
    """An Executor that samples each token's successor.

    A prompt's first token sets the duration of all further steps, in milliseconds.
    """

    num_ranks = 1
    max_in_flight = 1

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.step_s = MIN_STEP_S
        # By the previous token's bytes, as they are in a plan.
        self._sampled = {
            token_id.to_bytes(4, "little"): SampledToken(successor(token_id))
            for token_id in range(FIRST_ID, FIRST_ID + NUM_IDS)
        }
        self._submitted: deque[StepPlan] = deque()
        self.thread_id = 0
        self.cpu_ns = 0
        self.num_tokens = 0
        self.steps = 0

    def describe(self) -> list[RankDescription]:
        files = resolve_model(self._config.model)
        facts = read_facts(files.path)
        fmt = get_format(self._config.kv_format)
        return [
            RankDescription(
                model=files.name,
                model_revision=files.revision,
                dtype="float32",
                vocab_size=facts.vocab_size,
                max_model_len=facts.max_model_len,
                eos_token_ids=facts.eos_token_ids,
                sink_pages=fmt.sink_pages,
                recent_pages=fmt.recent_pages,
                hot_page_bytes=PAGE_BYTES,
                sealed_page_bytes=PAGE_BYTES,
                kv_budget_bytes=self._config.kv_memory_bytes or DEFAULT_CPU_KV_MEMORY_BYTES,
                head_dim=facts.head_dim,
            )
        ]

    def divergences(self, kv_formats: list[str]) -> list[float]:
        return [0.0] * len(kv_formats)

    def allocate(self, allocation: Allocation) -> None:
        """There is no pool to allocate."""

    def submit(self, plan: StepPlan) -> None:
        self._submitted.append(plan)

    def result(self, masks: MakeMasks | None = None) -> StepResult:
        return self.execute(self._submitted.popleft(), masks)

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        self.thread_id = threading.get_native_id()
        began_s, began_ns = time.monotonic(), time.thread_time_ns()
        for chunk in plan.chunks:
            if chunk.start == 0:
                self.step_s = max(MIN_STEP_S, int.from_bytes(chunk.tokens[:4], "little") / 1e3)
        sampled = self._sampled
        tokens = [sampled[chunk.tokens[-4:]] for chunk in plan.chunks if chunk.sample]
        self.num_tokens += len(tokens)
        self.steps += 1
        self.cpu_ns += time.thread_time_ns() - began_ns
        time.sleep(max(0.0, began_s + self.step_s - time.monotonic()))
        return StepResult(plan.step, tokens, 0.0)

    def close(self) -> None:
        """There are no ranks to stop."""
