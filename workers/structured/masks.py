"""Makes the masks of a step while the ranks compute its logits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
from llguidance import LLExecutor

from kvmesh.workers.plan import TokenMasks
from kvmesh.workers.structured.state import OutputState


class MaskMaker:
    """One thread, which has llguidance compute the rows in parallel. It starts with the first."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, "kvmesh-masks")

    @cached_property
    def _rows(self) -> LLExecutor:
        return LLExecutor()

    def start(self, step: int, states: Sequence[tuple[int, OutputState]]) -> Future[TokenMasks]:
        """Masks for a step. states: with their positions among the step's sampled chunks"""
        return self._thread.submit(self.make, step, states)

    def make(self, step: int, states: Sequence[tuple[int, OutputState]]) -> TokenMasks:
        bits = np.empty((len(states), self._words), dtype=np.int32)
        matched = []
        for row, (_, state) in enumerate(states):
            if (matcher := state.catch_up()) is not None:
                matched.append((matcher, row))
            else:
                state.write_mask(bits[row])
        if matched:
            row_bytes = self._words * bits.itemsize
            self._rows.unsafe_compute_mask_ptr(matched, bits.ctypes.data, row_bytes, len(states))
        for row, (_, state) in enumerate(states):
            state.note_fault()
            if state.fault is not None:
                state.write_mask(bits[row])
        return TokenMasks(step, [position for position, _ in states], bits.tobytes())
