"""What recurrent layers keep of a sequence, whatever its length. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class StateShape:
    """Of each of `layers` layers: the last inputs of a convolution, and a memory.

    channels, tail: [channels, tail] inputs, in the compute dtype
    memory: its shape, in fp32
    groups: ranks divide channels and the memory's first dimension by whole ones of these
    """

    layers: int
    channels: int
    tail: int
    memory: tuple[int, ...]
    groups: int

    def of_rank(self, ranks: int) -> StateShape:
        """One of that many equal parts."""
        first, *rest = self.memory
        return replace(
            self,
            channels=self.channels // ranks,
            memory=(first // ranks, *rest),
            groups=self.groups // ranks,
        )

    def num_bytes(self, itemsize: int) -> int:
        """Of one sequence. itemsize: of the compute dtype"""
        each = self.channels * self.tail * itemsize + math.prod(self.memory) * _FP32_BYTES
        return self.layers * each
