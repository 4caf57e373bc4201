"""A rank's decode steps by the GPU's kernels, in Triton's interpreter, against plain torch.

The kernels' own tests are in tests/kernels; here they meet the runner: what it writes, seals in
all layers together, reads back in the next steps, and how it pads.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.decode_steps import DecodeSteps
from benchmarks.random_model import SHAPES, random_model
from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.seal import seal_layers, seal_pages
from kvmesh.kernels.write import write_hot
from kvmesh.workers import runner
from kvmesh.workers.kv_pool import page_bytes_of
from kvmesh.workers.model.load import ServedModel
from kvmesh.workers.runner import ModelRunner
from kvmesh.workers.sizes import PageGeometry

SHAPE = SHAPES["tiny"]
CPU = torch.device("cpu")
SIZE, BATCH, CONTEXT, STEPS = 64, 2, 258, 36


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return random_model(SHAPE, torch.float32, CPU)


@pytest.mark.parametrize("kv_format", ["exact", "k4v2"])
def test_decode_steps_are_those_of_plain_torch(
    kv_format: str, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that end at 258 and 226 tokens fill a page on the way and read it sealed."""
    fmt = get_format(kv_format)
    sizes = {"num_layers": SHAPE.layers, "num_kv_heads": SHAPE.kv_heads, "page_size": SIZE}
    hot_bytes, sealed_bytes = page_bytes_of(
        fmt, **sizes, head_dim=SHAPE.head_dim, dtype=torch.float32
    )
    geometry = PageGeometry(SIZE, 1, 0, hot_bytes, sealed_bytes)
    logits: list[list[torch.Tensor]] = []
    sealed_pages = 0
    for backend in ("reference", "triton"):
        for operator in (paged_attention, write_hot, seal_pages, seal_layers):
            monkeypatch.setattr(runner, operator.__name__, partial(operator, backend=backend))
        steps = DecodeSteps(geometry, batch=BATCH, context=CONTEXT, steps=STEPS)
        rank = ModelRunner(
            model,
            fmt,
            steps.allocation,
            page_size=SIZE,
            sink_pages=1,
            recent_pages=0,
            dtype=torch.float32,
            device=CPU,
            samples=True,
            cuda_graphs=False,
        )
        torch.manual_seed(0)
        rank.pool.all_hot.normal_()
        content = torch.randn(SHAPE.layers, 8, 2, SHAPE.kv_heads, SIZE, SHAPE.head_dim)
        ids = torch.arange(len(rank.pool.sealed[0]), dtype=torch.int32)
        seal_layers(content, rank.pool.all_sealed, ids, ids, fmt=fmt)
        found = []
        for number in range(STEPS):
            plan = steps.plan([7 + number, 90 - number])
            sealed_pages += len(plan.seal_hot)
            found.append(rank.score(plan))
        logits.append([x for x in found if x is not None])
    assert sealed_pages == 2 * BATCH
    assert [len(found) for found in logits] == [STEPS, STEPS]
    for want, got in zip(*logits, strict=True):
        spread = want.std()
        assert (got - want).abs().max() < 2e-3 * spread
