"""Estimated activations against what a step of the rank's own model holds at once."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvmesh.cluster.planner.memory import activation_bytes
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import load_model
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.parallel.comm import Communicator
from tests.model.cases import CASES
from tests.model.small import make_small_model


class _Allocated(TorchDispatchMode):
    """The bytes of all tensors that operations have made and that are still held."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def attend_to_nothing(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttendArgs
) -> torch.Tensor:
    return q.new_zeros(*q.shape[:2], v.shape[2])


@pytest.mark.parametrize(
    "case", [name for name in CASES if name.endswith(("llama", "2", "3", "n"))]
)
@pytest.mark.parametrize("tokens", [300, 3000])
def test_no_step_holds_more_than_estimated(case: str, tokens: int, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    model = load_model(
        path, dtype=torch.bfloat16, device=torch.device("cpu"), comm=Communicator.single()
    )
    sizes = ModelSizes.of(json.loads((path / "config.json").read_text()), path)
    ids, rows = torch.zeros(tokens, dtype=torch.int64), torch.zeros(128, dtype=torch.int64)
    with torch.inference_mode(), _Allocated() as allocated:
        logits = model.forward(ids, ids, attend_to_nothing, rows)
        assert logits is not None
        torch.log_softmax(logits, dim=-1)
    estimated = activation_bytes(sizes, 1, tokens, 16)
    print(case, allocated.peak, estimated)
    assert allocated.peak <= estimated <= 2 * allocated.peak
