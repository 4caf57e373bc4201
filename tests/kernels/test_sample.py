"""The sampling kernel, against plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kvmesh.kernels.sample import SampleParams, sample_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# draw, temperature, top_k, top_p, min_p
KINDS = [
    (0.0, 0.0, 0, 1.0, 0.0),
    (0.3, 1.0, 0, 1.0, 0.0),
    (0.999999, 0.7, 0, 1.0, 0.0),
    (0.5, 1.3, 40, 1.0, 0.0),
    (0.9, 1.0, 1, 1.0, 0.0),
    (0.2, 1.0, 0, 0.9, 0.0),
    (0.6, 2.0, 2000, 0.8, 0.0),
    (0.6, 1.0, 300, 0.5, 0.01),
    (0.8, 1.0, 0, 1.0, 0.2),
    (0.8, 1.0, 0, 1e-9, 0.0),
]


def params_of(rows: Sequence[tuple[float, ...]], device: torch.device) -> SampleParams:
    draws, temperature, top_k, top_p, min_p = np.array(rows, dtype=np.float64).T
    return SampleParams.of(draws, temperature, top_k, top_p, min_p, device)


def sampled(logits: torch.Tensor, rows: Sequence[tuple[float, ...]], backend: str) -> list[int]:
    where = DEVICE if backend == "triton" else torch.device("cpu")
    found = sample_tokens(logits.to(where), params_of(rows, where), backend=backend)
    return found.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [5000, 63])
def test_the_kernel_draws_the_tokens_of_plain_torch(vocab: int) -> None:
    rows = KINDS * 2
    logits = torch.randn(len(rows), vocab) * 2
    logits[len(KINDS) :] = (logits[len(KINDS) :] * 2).round() / 2  # many of the same weight
    logits[:, 7] = -torch.inf
    want, got = (sampled(logits, rows, backend) for backend in ("reference", "triton"))
    assert got == want


@pytest.mark.slow
def test_rows_without_a_finite_best_logit_are_faults() -> None:
    logits = torch.randn(4, 3000)
    logits[0, 2500] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    rows = [(0.5, 0.0, 0, 1.0, 0.0), *[(0.5, 1.0, 5, 0.9, 0.0)] * 3]
    for backend in ("reference", "triton"):
        found = sampled(logits, rows, backend)
        assert found[:3] == [-1] * 3
        assert found[3] >= 0


def test_of_equal_weights_the_lowest_ids_are_kept() -> None:
    rows = [(draw, 1.0, 3, 1.0, 0.0) for draw in (0.1, 0.5, 0.9)]
    assert sampled(torch.zeros(3, 1000), rows, "reference") == [0, 1, 2]


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"a block \[5, n\]"):
        sample_tokens(torch.zeros(2, 9), params_of(KINDS[:1], torch.device("cpu")))
