"""The public operator `AttentionInput`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from kvmesh.kernels.addresses_numba import Record
from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.layer import numba_attention_input, reference
from kvmesh.kernels.linear import PackedWeight
from kvmesh.kernels.linear.packed import BLOCK


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """A layer up to its attention: a norm, one projection, RoPE on halves, values rotated if the
    format has them so, keys and values written.

    Like `FeedForward`, one call in place of operators that take longer to call than to compute.

    norm: [hidden] fp32, with its eps
    qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden]: queries, keys, values
    bias: of qkv, fp32, or None
    The projection's inputs are a multiple of MULTIPLE.
    """

    MULTIPLE: ClassVar[int] = BLOCK

    norm: Tensor
    eps: float
    qkv: PackedWeight
    bias: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    record: Record = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        hidden = self.norm.shape[0]
        if self.qkv.shape != (width, hidden):
            raise ValueError(f"qkv: expected {[width, hidden]}, got {list(self.qkv.shape)}")
        if self.bias is not None and self.bias.shape != (width,):
            raise ValueError(f"bias: expected {[width]}, got {list(self.bias.shape)}")
        if hidden % BLOCK:
            raise ValueError(f"qkv: expected inputs in multiples of {BLOCK}, got {hidden}")
        object.__setattr__(self, "record", numba_attention_input.record_of_input(self))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.norm.shape[0], self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def products(self) -> int:
        """Of a token."""
        return self.qkv.shape[0] * self.qkv.in_features

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        hot: Tensor,
        slots: Tensor,
        rotation: Rotation | None = None,
        *,
        backend: str = "numba",
    ) -> Tensor:
        """Write keys and values of the normalised x; return its rotated queries.

        x: [T, hidden] fp32 on the CPU; cos, sin: [T, head_dim], with two equal halves; contiguous
        hot, slots: as in `write_hot`; hot is fp32
        rotation: of values before they are written
        Returns [T, num_heads, head_dim]. A token's result has the same bits in any batch.
        """
        self.check(x, cos, sin, slots)
        if backend == "reference":
            return reference.attention_input(self, x, cos, sin, hot, slots, rotation)
        return numba_attention_input.attention_input(self, x, cos, sin, hot, slots, rotation)

    def check(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> None:
        """Raises ValueError naming the argument."""
        tokens = x.shape[0]
        for name, tensor, shape in (
            ("x", x, (tokens, self.norm.shape[0])),
            ("cos", cos, (tokens, self.head_dim)),
            ("sin", sin, (tokens, self.head_dim)),
            ("slots", slots, (tokens,)),
        ):
            if tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: expected a contiguous tensor {list(shape)}, got {list(tensor.shape)}"
                )
