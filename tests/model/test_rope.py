"""Undoing RoPE, checked with the models' own keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvmesh.kernels.formats.nuq.rope import RopePairs, phases
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import load_model
from kvmesh.workers.parallel.comm import Communicator
from tests.model.cases import CASES
from tests.model.small import make_small_model


@pytest.mark.parametrize("case", CASES)
def test_keys_of_a_token_are_equal_at_all_positions_once_rope_is_undone(
    case: str, tmp_path: Path
) -> None:
    """In the first layer, where a key depends only on its token and position."""
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    model = load_model(
        path, dtype=torch.float32, device=torch.device("cpu"), comm=Communicator.single()
    )
    keys: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, args: AttendArgs) -> Tensor:
        if layer == 0:
            keys.append(k.clone())
        return torch.zeros_like(q)

    positions = torch.tensor([0, 1, 2, 7, 100, 255])
    model.forward(torch.full((6,), 17), positions, attend, positions[:0])
    back = phases(model.ropes[0].inv_freq, positions).conj().unsqueeze(1)
    plain = RopePairs(model.ropes[0].interleaved).rotate(keys[0], back)
    spread = (plain - plain[:1]).abs().amax()
    assert spread < 1e-4 * plain.abs().amax()
    assert (keys[0] - keys[0][:1]).abs().amax() > 0.1 * plain.abs().amax()
