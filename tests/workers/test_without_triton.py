"""Where ranks find Triton."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

import pytest
import torch

from kvmesh.workers.without_triton import leave_out_triton


@pytest.mark.parametrize(
    ("device", "gpus", "left_out"),
    [("cpu", True, True), ("auto", False, True), ("auto", True, False), ("cuda", True, False)],
)
def test_a_rank_on_a_cpu_finds_no_triton(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: bool, left_out: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setitem(sys.modules, "triton", sys)
    del sys.modules["triton"]
    installed = find_spec("triton") is not None
    leave_out_triton(device)
    assert (find_spec("triton") is not None) == (installed and not left_out)
    if left_out:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("triton")


def test_what_has_been_imported_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", sys)
    leave_out_triton("cpu")
    assert sys.modules["triton"] is sys
