"""Consecutive layers that a decode step on CPUs goes through in one call."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from kvmesh.kernels.layer import LayerRun, RunLayer
from kvmesh.workers.model.blocks import FusedLayer
from kvmesh.workers.model.hook import AttendSlot, Entry, WrittenAttend


class LayerStack(nn.Module):
    """Takes the place of some layers in a model's list: one after the other, or in one call."""

    def __init__(self, layers: list[nn.Module], run: list[RunLayer], slot: AttendSlot) -> None:
        """run: the same layers"""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._in_order = layers
        self._run = LayerRun(run)
        self._head_dim = run[0].before.head_dim
        self._slot = slot

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Tensor:
        """[1, T, hidden] -> [1, T, hidden], in the same memory"""
        cos, sin = position_embeddings
        if (
            torch.is_inference_mode_enabled()
            and self._slot.entry >= Entry.WRITTEN
            and cos.shape[-1] == self._head_dim
        ):
            attend = cast("WrittenAttend", self._slot.attend)
            if attend.through(self._run, hidden_states[0], cos[0], sin[0]):
                return hidden_states
        for layer in self._in_order:
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return hidden_states


def stacked(layers: Iterable[nn.Module], slot: AttendSlot) -> nn.ModuleList:
    """The layers in order, those that can be taken in one call together."""
    found: list[nn.Module] = []
    pairs = [(layer, layer.in_run if isinstance(layer, FusedLayer) else None) for layer in layers]
    for sizes, group in groupby(pairs, lambda pair: pair[1] and pair[1].sizes):
        some, run = zip(*group, strict=True)
        found += some if sizes is None else [LayerStack(list(some), list(run), slot)]
    return nn.ModuleList(found)
