"""Observes the keys or values of a text and computes parameters from them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Observer(Protocol):
    """One side of a format, over all layers of a model."""

    @property
    def wants_gradients(self) -> bool:
        """Whether `observe` needs the gradients of the loss."""

    def observe(self, layer: int, x: Tensor, gradient: Tensor | None, positions: Tensor) -> None:
        """Called once per window and layer.

        x: [T, num_kv_heads, head_dim] fp32, keys (after RoPE) or values
        gradient: like x, of the window's summed loss; None unless `wants_gradients`
        positions: [T] int64
        """

    def params(self, layer: int) -> dict[str, Tensor]:
        """The side's parameters, after every window has been observed."""
