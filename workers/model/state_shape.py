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
    shared_groups, shared_channels: of the channels, those that several heads share, in so many
        groups of so many channels. A rank has those of its heads: whole groups, or one that it
        has in common with others
    """

    layers: int
    channels: int
    tail: int
    memory: tuple[int, ...]
    groups: int
    shared_groups: int = 0
    shared_channels: int = 0

    def divides_by(self, ranks: int) -> bool:
        """Whether so many ranks can have equal parts."""
        shared = self.shared_groups
        return self.groups % ranks == 0 and (shared % ranks == 0 or ranks % shared == 0)

    def shared_of(self, rank: int, ranks: int) -> tuple[int, int]:
        """The groups of channels that a rank has, [first, end)."""
        first = rank * self.shared_groups // ranks
        return first, first + max(self.shared_groups // ranks, min(self.shared_groups, 1))

    def of_rank(self, ranks: int) -> StateShape:
        """One of that many equal parts."""
        first, *rest = self.memory
        start, end = self.shared_of(0, ranks)
        own = self.channels - self.shared_groups * self.shared_channels
        return replace(
            self,
            channels=own // ranks + (end - start) * self.shared_channels,
            memory=(first // ranks, *rest),
            groups=self.groups // ranks,
            shared_groups=end - start,
        )

    def num_bytes(self, itemsize: int) -> int:
        """Of one sequence. itemsize: of the compute dtype"""
        each = self.channels * self.tail * itemsize + math.prod(self.memory) * _FP32_BYTES
        return self.layers * each
