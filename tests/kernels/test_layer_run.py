"""Layers of decoding tokens in one call: the bits of the same layers one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from kvmesh.kernels.attention import numba_attention, paged_attention
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.layer import AttentionInput, FeedForward, LayerRun, RunLayer, run
from kvmesh.kernels.linear import PackedWeight, WeightFormat, pack
from tests.kernels.cases import Case, Shape, make_case, with_prefixes

HIDDEN, WIDTH, LAYERS = 64, 96, 3
SHAPE = Shape(num_heads=6, num_kv_heads=2, head_dim=64, page_size=64, recent_pages=1)
FORMAT, ROTATED = get_format("int8"), get_format("k4v4")
LENGTHS = [500, 70, 300, 1, 65]


def layers() -> list[RunLayer]:
    """Their pages are in another order than they are, and they attend in different ways."""
    generator = torch.Generator().manual_seed(1)

    def weight(rows: int, columns: int, weight_format: WeightFormat) -> PackedWeight:
        values = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return pack(values, weight_format)

    def norm() -> torch.Tensor:
        return torch.rand(HIDDEN, generator=generator) + 0.5

    made = []
    heads, kv_heads, dim = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
    width = (heads + 2 * kv_heads) * dim
    attends = [(None, None), (None, 100), (20.0, None)]
    kinds: tuple[WeightFormat, ...] = ("int8", "int4", "int8")
    for index, (kind, (softcap, window)) in enumerate(zip(kinds, attends, strict=True)):
        bias = torch.randn(width, generator=generator) if index == 1 else None
        before = AttentionInput(
            norm(), 1e-5, weight(width, HIDDEN, kind), bias, heads, kv_heads, dim
        )
        after = FeedForward(
            weight(HIDDEN, heads * dim, kind),
            norm(),
            1e-6,
            weight(2 * WIDTH, HIDDEN, kind),
            weight(HIDDEN, WIDTH, kind),
        )
        made.append(RunLayer(before, after, LAYERS - 1 - index, dim**-0.5, softcap, window))
    return made


@dataclass
class Step:
    case: Case
    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    hot: torch.Tensor
    sealed: torch.Tensor
    fmt: KVFormat

    @property
    def rotations(self) -> tuple[Rotation | None, Rotation | None]:
        if not self.fmt.v.rotated:
            return None, None
        there, back = (
            Rotation.of(SHAPE.head_dim, torch.float32, torch.device("cpu"), back=back)
            for back in (False, True)
        )
        return there, back

    def copy(self) -> Step:
        return replace(self, x=self.x.clone(), hot=self.hot.clone())

    def through(self, layer_run: LayerRun) -> bool:
        pages = (self.hot, self.sealed)
        arguments = (self.x, self.cos, self.sin, self.slots, *pages, self.case.batch)
        return layer_run(*arguments, fmt=self.fmt, rotations=self.rotations)

    def one_by_one(self) -> None:
        there, back = self.rotations
        for layer in layers():
            hot = self.hot[layer.index]
            q = layer.before(self.x, self.cos, self.sin, hot, self.slots, there)
            out, _ = paged_attention(
                q,
                hot,
                self.sealed[layer.index],
                self.case.batch,
                fmt=self.fmt,
                scale=layer.scale,
                softcap=layer.softcap,
                sliding_window=layer.sliding_window,
                backend="numba",
            )
            out = out if back is None else back(out)
            layer.after(out.flatten(1), self.x)

    def changed_as(self, other: Step) -> bool:
        return self.x.equal(other.x) and self.hot.nan_to_num(7.0).equal(other.hot.nan_to_num(7.0))


def step_of(case: Case, fmt: KVFormat = FORMAT) -> Step:
    batch, size = case.batch, SHAPE.page_size
    generator = torch.Generator().manual_seed(2)
    last = torch.repeat_interleave(batch.seq_lens, batch.query_starts.diff()) - 1
    rows = torch.repeat_interleave(batch.rows, batch.query_starts.diff())
    slots = batch.hot_tables[rows, last // size].long() * size + last % size
    angles = torch.rand(len(slots), SHAPE.head_dim // 2, generator=generator).repeat(1, 2)
    hot = torch.stack([case.hot + index for index in range(LAYERS)])
    sealed = torch.stack([case.sealed] * LAYERS)
    x = torch.randn(len(slots), HIDDEN, generator=generator)
    return Step(case, x, angles.cos(), angles.sin(), slots, hot, sealed, fmt)


def decoding(lengths: list[int], fmt: KVFormat = FORMAT) -> Case:
    return make_case(fmt, SHAPE, [(length, 1) for length in lengths])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS, [70] * 40])
def test_it_has_the_bits_of_layers_one_by_one(
    lengths: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(run, "MIN_PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr(run, "MAX_IMBALANCE", math.inf)
    for fmt in (FORMAT, ROTATED):
        found = step_of(decoding(lengths, fmt), fmt)
        want = found.copy()
        want.one_by_one()
        assert found.through(LayerRun(layers()))
        assert found.changed_as(want)


@pytest.mark.parametrize("fmt", [FORMAT, ROTATED], ids=lambda fmt: fmt.name)
def test_a_token_has_the_same_bits_in_any_batch(fmt: KVFormat) -> None:
    whole = step_of(decoding(LENGTHS, fmt), fmt)
    x, batch = whole.x.clone(), whole.case.batch
    assert whole.through(LayerRun(layers()))
    for seq in range(len(LENGTHS)):
        one = slice(seq, seq + 1)
        alone = replace(
            batch,
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=batch.seq_lens[one],
            rows=batch.rows[one],
        )
        part = replace(whole, case=replace(whole.case, batch=alone), x=x[one].clone())
        part = replace(part, cos=part.cos[one], sin=part.sin[one], slots=part.slots[one])
        assert part.through(LayerRun(layers()))
        assert part.x.equal(whole.x[one])


def test_a_shared_prefix_is_read_once_by_one_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(FORMAT, SHAPE, [(300, 1), (330, 1), (70, 1)], shared_prefix_pages=3)
    found = step_of(with_prefixes(case, [([0, 1], 3)]))
    want, unchanged = found.copy(), found.copy()
    want.one_by_one()
    assert found.through(LayerRun(layers()))
    assert found.changed_as(want)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(run, "MIN_PRODUCTS_PER_THREAD", 1)
    again = unchanged.copy()
    assert not again.through(LayerRun(layers()))
    assert again.changed_as(unchanged)


def test_other_steps_are_left_to_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, and work for more threads than there are tokens, or for one of them."""
    made = LayerRun(layers())
    refused = [step_of(make_case(FORMAT, SHAPE, [(300, 1), (90, 7)]))]
    monkeypatch.setattr(run, "MIN_PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    refused.append(step_of(decoding([70, 70 * 64])))
    for step in refused:
        unchanged = step.copy()
        assert not step.through(made)
        assert step.changed_as(unchanged)
    one = step_of(decoding([500]))
    assert one.copy().through(made)
    monkeypatch.setattr(numba_attention, "MIN_PAGES_PER_THREAD", 1)
    assert not replace(one, case=decoding([500])).through(made)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(run, "MIN_PRODUCTS_BY_ROWS", 1)
    assert not replace(one, case=decoding([500])).through(made)


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    made = LayerRun(layers())
    step = step_of(decoding([300, 70]))
    with pytest.raises(
        ValueError, match=r"slots: expected less than \d+, the slots of hot, got 99"
    ):
        replace(step, slots=step.slots + 99_000).through(made)
    with pytest.raises(ValueError, match=r"cos: expected a contiguous tensor \[2, 64\]"):
        replace(step, cos=step.cos[:, :32]).through(made)
    step.case.batch.sealed_tables[step.case.batch.rows[0], 1] = -1
    with pytest.raises(ValueError, match=r"sealed_tables: row \d has no page id at logical page 1"):
        step.through(made)
    other = layers()
    with pytest.raises(ValueError, match="layers: expected one or more of the same sizes"):
        LayerRun(
            [
                other[0],
                replace(other[1], before=replace(other[1].before, num_heads=10, num_kv_heads=0)),
            ]
        )
