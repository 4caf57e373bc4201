"""What sees the keys, or the values, of a text go by, and makes parameters of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Observer(Protocol):
    """One side of a format, over all layers of a model."""

    @property
    def wants_gradients(self) -> bool:
        """Whether `observe` needs the gradients of the loss."""

    def observe(self, layer: int, x: Tensor, gradient: Tensor | None, positions: Tensor) -> None:
        """Called once a window and layer.

        x: [T, num_kv_heads, head_dim] fp32, keys (after RoPE) or values
        gradient: like x, of the window's summed loss; None unless wanted
        positions: [T] int64
        """

    def params(self, layer: int) -> dict[str, Tensor]:
        """The side's parameters, once every window was seen."""
