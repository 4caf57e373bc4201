"""The engine's interface to the ranks that execute its plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from kvmesh.workers.plan import StepPlan, StepResult, TokenMasks

# Waits for the masks of a step, which are made while the ranks compute.
MakeMasks = Callable[[], TokenMasks]


class RankDescription(msgspec.Struct, tag="description", frozen=True):
    """What a rank reports once its weights are loaded.

    vocab_size: all tokens have ids below it
    hot_page_bytes, sealed_page_bytes: of one page on this rank
    state_bytes: of a sequence's recurrent state on this rank
    kv_budget_bytes: its memory that is left for KV
    device: cpu or cuda
    memory_bytes: all that the GPU has, 0 on CPUs
    kvp: the ranks to which pages are dealt
    gpu_uuid: as NVML writes it, "" on CPUs
    kv_format: its name, which the configuration may leave to be chosen for the model
    values_in_keys: how many channels of a key are its value, see ModelFacts
    rope: how positions are scaled, see ModelFacts
    operators: that were chosen when it was loaded, such as "far keys: torch, sums: NCCL"
    model_path: directory with the model's tokenizer, on the ranks' host, which is the leader's
    """

    model: str
    model_revision: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    sink_pages: int
    recent_pages: int
    hot_page_bytes: int
    sealed_page_bytes: int
    kv_budget_bytes: int
    head_dim: int
    device: str = "cpu"
    gpu_uuid: str = ""
    model_path: str = ""
    memory_bytes: int = 0
    state_bytes: int = 0
    rope: str = "default"
    kvp: int = 1
    kv_format: str = ""
    values_in_keys: int = 0
    operators: str = ""


class Allocation(msgspec.Struct, tag="allocation", frozen=True):
    """The pool every rank of a group allocates; all counts are pages or rows."""

    hot_pages: int
    sealed_pages: int
    max_rows: int
    max_pages_per_row: int


class Executor(Protocol):
    """All ranks of a group. Any method may raise WorkerDiedError.

    max_in_flight: how many steps may be submitted whose results were not read: 2 where the ranks
        compute one while the caller reads the result of the one before
    """

    @property
    def num_ranks(self) -> int: ...

    @property
    def max_in_flight(self) -> int: ...

    def describe(self) -> list[RankDescription]:
        """One for each rank, once all have loaded the model. Blocks until then."""

    def divergences(self, kv_formats: list[str]) -> list[float]:
        """Mean KL(exact ‖ format) of the next token, in nats, of each format on a short text
        (workers/scoring/probe.py). Call it before `allocate`, which takes its memory."""

    def allocate(self, allocation: Allocation) -> None:
        """Allocate every rank's pool; called once, before the first step."""

    def submit(self, plan: StepPlan) -> None:
        """Give every rank a step, which they compute after those that they have."""

    def result(self, masks: MakeMasks | None = None) -> StepResult:
        """Wait for the result of the oldest step in flight. masks: of that step, if it is masked"""

    def close(self) -> None:
        """End the ranks. Idempotent."""


class StepByStep(ABC):
    """The part of an Executor that computes each step when its result is asked for.

    max_in_flight: may be set to more than 1: then a plan still waits, but without a result
    """

    max_in_flight = 1

    def __init__(self) -> None:
        self._submitted: deque[StepPlan] = deque()

    @abstractmethod
    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        """Compute one step on every rank. masks: if the plan is masked"""

    def submit(self, plan: StepPlan) -> None:
        assert len(self._submitted) < self.max_in_flight, "too many steps in flight"
        self._submitted.append(plan)

    def result(self, masks: MakeMasks | None = None) -> StepResult:
        return self.execute(self._submitted.popleft(), masks)
