"""A rank's decode steps: GPU kernels against plain torch, and CUDA graphs against no graphs.

The kernels' own tests are in tests/kernels. These test the kernels with the runner: what it
writes, seals in all layers together, reads back in the next steps, and how it pads. Without a
GPU the kernels run in Triton's interpreter, and there are no graphs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.decode_steps import DecodeSteps
from benchmarks.random_model import SHAPES, dtype_on, random_model
from benchmarks.stand_in_params import model_params_for
from kvmesh.kernels import gpu
from kvmesh.kernels.attention import DecodeWork, Windows, paged_attention
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.layer import LayerRun
from kvmesh.kernels.seal import seal_layers, seal_pages
from kvmesh.kernels.write import write_hot
from kvmesh.workers import step_attention
from kvmesh.workers.decode_graphs import key_of, padded, sizes_for
from kvmesh.workers.model.load import ServedModel
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import StepPlan
from kvmesh.workers.runner import ModelRunner
from kvmesh.workers.sizes import PageGeometry, page_bytes_of
from kvmesh.workers.step import StepArrays, Works
from kvmesh.workers.step_attention import StepAttention

SHAPE = SHAPES["tiny"]
SIZE, CONTEXT = 64, 258
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = dtype_on(DEVICE)
ROUNDING = 2e-3 if DEVICE.type == "cpu" else 0.1  # of the logits' spread


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return random_model(SHAPE, DTYPE, DEVICE)


def plans(fmt: KVFormat, batch: int, steps: int) -> tuple[DecodeSteps, list[StepPlan]]:
    """Plans for sequences that end at 258 tokens or fewer; the longest fills a page."""
    hot_bytes, sealed_bytes = page_bytes_of(
        fmt,
        num_layers=SHAPE.layers,
        num_kv_heads=SHAPE.kv_heads,
        page_size=SIZE,
        head_dim=SHAPE.head_dim,
        dtype_bytes=DTYPE.itemsize,
    )
    geometry = PageGeometry(SIZE, 1, 0, hot_bytes, sealed_bytes)
    made = DecodeSteps(geometry, batch=batch, context=CONTEXT, steps=steps)
    tokens = [[7 + number + 20 * row for row in range(batch)] for number in range(steps)]
    return made, [made.plan(ids) for ids in tokens]


def filled_rank(
    model: ServedModel, fmt: KVFormat, steps: DecodeSteps, *, graphs: bool = False
) -> ModelRunner:
    """Its pages hold the same numbers every time."""
    params = model_params_for(fmt, SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim)
    if params is not None:
        params = params.to(DEVICE)
    rank = ModelRunner(
        model,
        fmt,
        steps.allocation,
        Communicator.single(),
        page_size=SIZE,
        sink_pages=1,
        recent_pages=0,
        dtype=DTYPE,
        device=DEVICE,
        samples=True,
        cuda_graphs=graphs,
        params=params,
    )
    torch.manual_seed(0)
    rank.pool.all_hot.normal_()
    count = rank.pool.all_sealed.shape[1]
    content = torch.randn(SHAPE.layers, count, 2, SHAPE.kv_heads, SIZE, SHAPE.head_dim)
    ids = torch.arange(count, dtype=torch.int32, device=DEVICE)
    seal_layers(
        content.to(DEVICE, DTYPE),
        rank.pool.all_sealed,
        ids,
        ids,
        fmt=fmt,
        params=params,
        positions=ids.long() * SIZE,
    )
    return rank


def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layers are taken in one call."""
    monkeypatch.setattr(StepAttention, "through", lambda *_: False)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cpu", reason="on CPUs alone")
@pytest.mark.parametrize("kv_format", ["exact", "k4v4"])
def test_layers_in_one_call_have_the_bits_of_one_after_the_other(
    kv_format: str, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, calls = get_format(kv_format), []
    steps, made = plans(fmt, batch=2, steps=3)
    taken = LayerRun.__call__

    def counted(*arguments: Any, **options: Any) -> bool:
        calls.append(taken(*arguments, **options))
        return calls[-1]

    rank = filled_rank(model, fmt, steps)
    monkeypatch.setattr(LayerRun, "__call__", counted)
    found = [rank.score(plan) for plan in made]
    assert calls == [True] * len(made)  # one for all layers
    layer_by_layer(monkeypatch)
    rank = filled_rank(model, fmt, steps)
    for plan, logits in zip(made, found, strict=True):
        want = rank.score(plan)
        assert want is not None and logits is not None and want.equal(logits)
    assert len(calls) == len(made)


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", ["exact", "k4v2", "nuq3"])
def test_decode_steps_equal_those_of_plain_torch(
    kv_format: str, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = get_format(kv_format)
    steps, made = plans(fmt, batch=2, steps=6)
    assert sum(len(plan.seal_hot) for plan in made[:-2]) == 1  # and read afterwards
    layer_by_layer(monkeypatch)
    logits: list[list[torch.Tensor | None]] = []
    for backend in ("reference", "triton"):
        for operator in (paged_attention, write_hot, seal_pages, seal_layers):
            monkeypatch.setattr(
                step_attention, operator.__name__, partial(operator, backend=backend)
            )
        rank = filled_rank(model, fmt, steps)
        logits.append([rank.score(plan) for plan in made])
    for want, got in zip(*logits, strict=True):
        assert want is not None and got is not None
        assert (got - want).abs().max() < ROUNDING * want.std()


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", ["exact", "k4v4"])
def test_a_rank_with_kernels_equals_one_of_plain_torch(
    kv_format: str, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kernels of a GPU's rank, its fused layers, its warm-up, and its single transfer."""
    fmt = get_format(kv_format)
    steps, made = plans(fmt, batch=2, steps=3)
    plain = filled_rank(model, fmt, steps)
    want = [plain.score(plan) for plan in made]
    monkeypatch.setattr(gpu, "runs_kernels", lambda _tensor: True)
    rank = filled_rank(random_model(SHAPE, DTYPE, DEVICE), fmt, steps)
    for plan, logits in zip(made, want, strict=True):
        result = rank.execute(plan)
        assert result is not None and logits is not None
        for row, token in zip(logits, result.tokens, strict=True):
            assert row.max() - row[token.token_id] < 0.05 * row.std()


def test_graphs_are_chosen_by_size_and_work() -> None:
    """Which graph covers a decode step, and what its padding holds."""
    assert sizes_for(3) == (1, 2, 4)
    assert sizes_for(33)[-1] == 40
    assert sizes_for(300)[-1] == 256
    count, none = 3, np.zeros(0, np.int64)
    ends = np.array([2**20, 100, 70])
    starts = np.arange(count + 1)
    step = StepArrays(ends, ends, ends, ends, starts, ends, ends, none, none, none)
    windows = Windows(64, 1, 1, None)
    work = DecodeWork.of(step.attention_lengths, windows)
    works: Works = {None: (work, tuple(work.rounds()))}
    key = key_of(step, works, sizes_for(16))
    assert key is not None and (key.size, key.parts) == (4, 4096)
    longer = padded(works, key.size)[None][0]
    assert longer.starts.tolist() == [*work.starts, work.num_slots]
    assert key_of(step, works, sizes_for(2)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on GPUs")
@pytest.mark.parametrize("kv_format", ["exact", "int8", "k4v2"])
def test_steps_from_graphs_choose_the_same_tokens(kv_format: str, model: ServedModel) -> None:
    """Three sequences, so that a graph of four is padded, through the steps that seal."""
    fmt = get_format(kv_format)
    steps, made = plans(fmt, batch=3, steps=36)
    assert sum(len(plan.seal_hot) for plan in made) >= 2
    eager = filled_rank(model, fmt, steps)
    captured = filled_rank(model, fmt, steps, graphs=True)
    for plan in made:
        logits, result = eager.score(plan), captured.execute(plan)
        assert logits is not None and result is not None
        for row, token in zip(logits, result.tokens, strict=True):
            # Keys are split for the longest possible sequence, so the rounding differs.
            assert row.max() - row[token.token_id] < 0.05 * row.std()
