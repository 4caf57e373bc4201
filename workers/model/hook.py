"""How a model's layers reach kvmesh's attention.

transformers asks its AttentionInterface for the function named in the model's
configuration; "kvmesh" is registered there. No mask is registered beside it,
so transformers materialises none: who may see what is the caller's business.

The caller's `attend` comes by an AttendSlot that each attention module holds,
not by keyword arguments, which not every architecture hands down (StableLM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "kvmesh"


@dataclass(frozen=True, slots=True)
class AttendArgs:
    """What a layer's attention computes besides the plain softmax.

    scale: the products of queries and keys are multiplied by it
    softcap: c, where products s become c * tanh(s / c), after the scale; None for none
    sliding_window: w, where the query at position i reads the keys at (i - w, i]; None for all
    """

    scale: float
    softcap: float | None = None
    sliding_window: int | None = None


# (layer, q [T, Hq, D] after RoPE, k [T, Hkv, D], v [T, Hkv, D], args) -> out [T, Hq, D].
# Heads are the rank's own; the tensors may be strided views.
Attend = Callable[[int, Tensor, Tensor, Tensor, AttendArgs], Tensor]


class AttendSlot:
    """Holds the `attend` of the forward pass under way; one a model."""

    __slots__ = ("attend",)

    def __init__(self) -> None:
        self.attend: Attend | None = None

    @contextmanager
    def holding(self, attend: Attend) -> Iterator[None]:
        assert self.attend is None, "a forward pass of this model is under way"
        self.attend = attend
        try:
            yield
        finally:
            self.attend = None


def attach(attention: nn.Module, slot: AttendSlot) -> None:
    """Let the attention module of a transformers layer find `slot`."""
    attention.kvmesh_slot = slot  # type: ignore[assignment]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query [1, Hq, T, D], key and value [1, Hkv, T, D]."""
    assert attention_mask is None
    assert query.shape[0] == 1
    slot: AttendSlot = module.kvmesh_slot  # type: ignore[assignment]
    assert slot.attend is not None, "attention outside ServedModel.forward"
    args = AttendArgs(scaling, softcap, sliding_window)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return slot.attend(layer, q, k, v, args).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _attention)
