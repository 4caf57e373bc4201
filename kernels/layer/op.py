"""The public operator `FeedForward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from kvmesh.kernels.addresses_numba import Record
from kvmesh.kernels.layer import numba_layer, reference
from kvmesh.kernels.linear import PackedWeight
from kvmesh.kernels.linear.packed import BLOCK


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A layer after attention: its output projection, a norm, an MLP with SiLU, two residuals.

    With small weights, each of the six operators takes as long to call as to compute. Here one
    call computes all of them, for some tokens at a time, whose numbers stay in the cache.

    o_proj: [hidden, num_heads * head_dim]; norm: [hidden] fp32, with its eps
    gate_up: [2 * width, hidden], gate then up; down: [hidden, width]
    The inputs of each product are a multiple of MULTIPLE.
    """

    MULTIPLE: ClassVar[int] = BLOCK

    o_proj: PackedWeight
    norm: Tensor
    eps: float
    gate_up: PackedWeight
    down: PackedWeight
    record: Record = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        hidden, width = self.down.shape
        shapes = {
            "o_proj": (self.o_proj.shape[0], hidden),
            "norm": (self.norm.shape[0], hidden),
            "gate_up": (tuple(self.gate_up.shape), (2 * width, hidden)),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(
                    f"{name}: expected {expected} for down [{hidden}, {width}], got {found}"
                )
        if any(size % BLOCK for size in (hidden, width, self.o_proj.in_features)):
            raise ValueError(f"o_proj, gate_up, down: expected inputs in multiples of {BLOCK}")
        object.__setattr__(self, "record", numba_layer.record_of_layer(self))

    @property
    def products(self) -> int:
        """Of a token."""
        hidden, width = self.down.shape
        return hidden * (self.o_proj.in_features + 3 * width)

    def __call__(self, heads: Tensor, residual: Tensor, *, backend: str = "numba") -> None:
        """residual += o_proj heads, then += down(silu(gate n) * up n) of n = its norm, in place.

        heads: [T, num_heads * head_dim]; residual: [T, hidden]; fp32 on the CPU, contiguous
        A token's result has the same bits in any batch.
        """
        if not (heads.is_contiguous() and residual.is_contiguous()):
            raise ValueError("heads, residual: expected contiguous tensors")
        if heads.shape != (residual.shape[0], self.o_proj.in_features):
            raise ValueError(
                f"heads: expected [{residual.shape[0]}, {self.o_proj.in_features}],"
                f" got {list(heads.shape)}"
            )
        implementation = {"numba": numba_layer, "reference": reference}[backend]
        implementation.feed_forward(self, heads, residual)
