"""How a model's layers call kvmesh's attention.

transformers looks up the attention function named in the model's configuration in its
AttentionInterface, where "kvmesh" is registered. No mask is registered with it, so
transformers creates none: the caller decides which keys are visible.

The caller's `attend` is passed through an AttendSlot that each attention module holds,
because not every architecture passes keyword arguments on (StableLM does not).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.layer import LayerRun
from kvmesh.workers.model.recurrent_state import StepStates

IMPLEMENTATION = "kvmesh"


@dataclass(frozen=True, slots=True)
class AttendArgs:
    """Parameters of a layer's attention besides the plain softmax.

    scale: factor of the products of queries and keys
    softcap: c, where products s become c * tanh(s / c), after the scale; None for none
    sliding_window: w, where the query at position i reads the keys at (i - w, i]; None for all;
        w < 0 for attention in chunks of -w tokens, where it reads those of its own chunk
    sinks: [num_heads], of this rank; a score that each query of a head has besides those of its
        keys, whose value is 0; None for none
    rope: cos and sin, [T, D] each, if queries and keys have yet to be rotated (`Entry.ROPE`)
    """

    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None


# (layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D], args) -> out [T, Hq, D].
# Heads are the rank's; the tensors may be strided views.
Attend = Callable[[int, Tensor, Tensor, Tensor, AttendArgs], Tensor]


class WrittenAttend(Protocol):
    """An `Attend` that also takes keys and values which a layer has written to their pages."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, args: AttendArgs, /
    ) -> Tensor: ...

    def target(self, layer: int) -> tuple[Tensor, Tensor, Rotation | None]:
        """hot and slots, as in `write_hot`, and how values are rotated before"""
        ...

    def read(self, layer: int, q: Tensor, args: AttendArgs) -> Tensor:
        """[T, Hq, D] like q, once keys and values are there"""
        ...

    def through(self, run: LayerRun, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Take the hidden states [T, hidden] through these layers, in place; False, and nothing has
        changed, if they have to be taken layer by layer"""
        ...


class Entry(IntEnum):
    """How far a layer may take its queries, keys and values: any level allows those below."""

    PLAIN = 0  # `attend` gets them after RoPE
    ROPE = 1  # it applies RoPE itself where it gets `AttendArgs.rope`
    WRITTEN = 2  # it is a `WrittenAttend`


class AttendSlot:
    """Holds the `attend` of the forward pass in progress; one per model."""

    __slots__ = ("attend", "entry", "positions", "states")

    def __init__(self) -> None:
        self.attend: Attend | None = None
        self.positions: Tensor | None = None
        self.states: StepStates | None = None
        self.entry = Entry.PLAIN

    @contextmanager
    def holding(
        self,
        attend: Attend,
        positions: Tensor,
        states: StepStates | None,
        entry: Entry = Entry.PLAIN,
    ) -> Iterator[None]:
        """positions: [T] int64, of the pass's tokens
        states: of its sequences, if the model has recurrent layers
        entry: what `attend` takes
        """
        assert self.attend is None, "a forward pass of this model is already running"
        self.attend, self.positions, self.states = attend, positions, states
        self.entry = entry
        try:
            yield
        finally:
            self.attend, self.positions, self.states, self.entry = None, None, None, Entry.PLAIN


def attach(attention: nn.Module, slot: AttendSlot) -> None:
    """Give `slot` to the attention module of a transformers layer."""
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
    s_aux: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Has transformers' signature: query [1, Hq, T, D], key and value [1, Hkv, T, D]."""
    assert attention_mask is None
    assert query.shape[0] == 1
    slot: AttendSlot = module.kvmesh_slot  # type: ignore[assignment]
    assert slot.attend is not None, "attention was called outside ServedModel.forward"
    args = AttendArgs(scaling, softcap, sliding_window, sinks=s_aux)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return slot.attend(layer, q, k, v, args).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _attention)
