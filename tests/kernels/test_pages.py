"""Writing, sealing and merging in plain torch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.stand_in_params import model_params_for, params_for
from kvmesh.kernels.formats.base import NO_PARAMS
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.kernels.merge import merge_sinks, merge_states
from kvmesh.kernels.seal import seal_layers, seal_pages
from kvmesh.kernels.write import write_hot


def test_write_puts_every_token_into_its_slot_and_changes_nothing_else() -> None:
    hot = torch.full((5, 2, 3, 16, 64), float("nan"))
    k, v = torch.randn(2, 4, 3, 64)
    write_hot(k, v, hot, torch.tensor([0, 79, -1, 33]))
    for token, (page, offset) in {0: (0, 0), 1: (4, 15), 3: (2, 1)}.items():
        assert torch.equal(hot[page, 0, :, offset], k[token])
        assert torch.equal(hot[page, 1, :, offset], v[token])
    assert hot.isfinite().all((1, 2, 4)).sum() == 3


def test_write_refuses_wrong_shapes() -> None:
    hot = torch.zeros(5, 2, 3, 16, 64)
    k = torch.zeros(4, 3, 64)
    slots = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="k, v"):
        write_hot(k, k[:2], hot, slots)
    with pytest.raises(ValueError, match="hot"):
        write_hot(k[:, :2], k[:, :2], hot, slots)
    with pytest.raises(ValueError, match="slots"):
        write_hot(k, k, hot, slots[:3])


@pytest.mark.parametrize("name", format_names())
def test_layers_sealed_together_equal_those_sealed_separately(name: str) -> None:
    fmt = get_format(name)
    hot = torch.randn(4, 6, 2, 3, 64, 64)
    together = torch.zeros(4, 9, 3, fmt.page_bytes(64, 64, 4), dtype=torch.uint8)
    alone = together.clone()
    ids = torch.tensor([5, -1, 2], dtype=torch.int32), torch.tensor([8, 3, 0], dtype=torch.int32)
    params, at = model_params_for(fmt, 4, 3, 64), torch.tensor([640, 0, 64])
    seal_layers(hot, together, *ids, fmt=fmt, params=params, positions=at)
    for layer in range(4):
        found = NO_PARAMS if params is None else params.layers[layer]
        seal_pages(hot[layer], alone[layer], *ids, fmt=fmt, params=found, positions=at)
    assert torch.equal(together, alone)
    assert (together[:, 3] == 0).all() and (together[:, 8] != 0).any()


@pytest.mark.parametrize("name", format_names())
def test_seal_encodes_only_the_given_pages(name: str) -> None:
    fmt = get_format(name)
    hot = torch.randn(6, 2, 3, 16, 64)
    sealed = torch.full((9, 3, fmt.page_bytes(16, 64, 4)), 0xAA, dtype=torch.uint8)
    pages = [(4, 8), (0, 3), (5, 0), (1, 6)]  # the first and the last ones too
    hot_ids, sealed_ids = torch.tensor(pages, dtype=torch.int32).T
    params, at = params_for(fmt, 3, 64), torch.tensor([160, 16, 0, 64])
    seal_pages(hot, sealed, hot_ids, sealed_ids, fmt=fmt, params=params, positions=at)
    for index, (hot_id, sealed_id) in enumerate(pages):
        one = slice(hot_id, hot_id + 1)
        want = fmt.encode(hot[one, 0], hot[one, 1], params, at[index : index + 1])
        assert torch.equal(sealed[sealed_id], want[0])
    assert (sealed[[1, 2, 4, 5, 7]] == 0xAA).all()


def test_seal_skips_padding() -> None:
    fmt = get_format("nuq4")
    params = params_for(fmt, 1, 64)
    hot = torch.randn(3, 2, 1, 16, 64)
    sealed = torch.zeros(3, 1, fmt.page_bytes(16, 64), dtype=torch.uint8)
    hot_ids, sealed_ids = torch.tensor([[-1, 2, -1], [0, 1, -1]], dtype=torch.int32)
    at = torch.tensor([0, 48, 0])
    seal_pages(hot, sealed, hot_ids, sealed_ids, fmt=fmt, params=params, positions=at)
    want = fmt.encode(hot[2:, 0], hot[2:, 1], params, at[1:2])
    assert torch.equal(sealed[1], want[0])
    assert (sealed[[0, 2]] == 0).all()


def test_seal_nothing_and_wrong_shapes() -> None:
    fmt = get_format("int8")
    hot = torch.randn(2, 2, 3, 16, 64)
    sealed = torch.zeros(2, 3, fmt.page_bytes(16, 64), dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int32)
    seal_pages(hot, sealed, none, none, fmt=fmt)
    assert (sealed == 0).all()
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="hot_ids"):
        seal_pages(hot, sealed, one, none, fmt=fmt)
    with pytest.raises(ValueError, match="sealed"):
        seal_pages(hot, sealed[..., :-1], one, one, fmt=fmt)
    for wrong in (hot, hot[None, :, :1]):
        with pytest.raises(ValueError, match=r"hot: expected \[num_layers, num_hot_pages, 2"):
            seal_layers(wrong, sealed[None], one, one, fmt=fmt)
    with pytest.raises(ValueError, match=r"sealed: expected \[num_layers"):
        seal_layers(hot[None], sealed, one, one, fmt=fmt)
    with pytest.raises(ValueError, match="expected 1 layers as in hot, got 2"):
        seal_layers(hot[None], torch.stack((sealed, sealed)), one, one, fmt=fmt)
    nuq = get_format("nuq2")
    needed = torch.zeros(1, 2, 3, nuq.page_bytes(16, 64), dtype=torch.uint8)
    with pytest.raises(ValueError, match="params: nuq2 needs calibrated parameters of 1 layers"):
        seal_layers(hot[None], needed, one, one, fmt=nuq)
    with pytest.raises(ValueError, match=r"positions: format nuq2 needs the first positions of 1"):
        seal_layers(hot[None], needed, one, one, fmt=nuq, params=model_params_for(nuq, 1, 3, 64))
    with pytest.raises(ValueError, match="backend"):
        seal_layers(hot[None], sealed[None], one, one, fmt=fmt, backend="cuda")


def test_merge_of_parts_is_attention_over_the_union() -> None:
    q = torch.randn(5, 3, 64, dtype=torch.float64) * 0.125
    k, v = torch.randn(2, 40, 3, 64, dtype=torch.float64)
    scores = torch.einsum("ihd,jhd->ihj", q, k)
    outs, lses = [], []
    for part in (slice(0, 7), slice(7, 8), slice(8, 40)):
        outs.append(torch.einsum("ihj,jhd->ihd", scores[..., part].softmax(-1), v[part]))
        lses.append(scores[..., part].logsumexp(-1))
    out, lse = merge_states(torch.stack(outs).float(), torch.stack(lses).float())
    want = torch.einsum("ihj,jhd->ihd", scores.softmax(-1), v)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=0)


def test_merge_ignores_parts_without_keys() -> None:
    outs = torch.randn(3, 2, 1, 64)
    outs[1] = float("nan")
    lses = torch.tensor([[[1.0], [-torch.inf]], [[-torch.inf]] * 2, [[-torch.inf]] * 2])
    out, lse = merge_states(outs, lses)
    assert torch.equal(out[0], outs[0, 0])
    assert lse[0] == 1.0
    assert (out[1] == 0).all()
    assert lse[1] == -torch.inf


def test_merge_survives_large_lses() -> None:
    outs = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    out, lse = merge_states(outs, torch.full((2, 1, 1), 1e4))
    assert out.item() == pytest.approx(2.0)
    assert lse.item() == pytest.approx(1e4 + 0.6931, rel=1e-6)


def test_merge_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="outs, lses"):
        merge_states(torch.zeros(2, 3, 1, 8), torch.zeros(2, 3))


def test_a_sink_is_one_more_part_of_output_zero() -> None:
    out, lse = torch.randn(4, 3, 80), torch.randn(4, 3) * 10
    lse[1] = -torch.inf  # a row of no sequence
    out[1] = 0.0
    sinks = torch.tensor([-30.0, 0.5, 30.0])
    parts = torch.stack((out, torch.zeros_like(out)))
    lses = torch.stack((lse, sinks.expand_as(lse)))
    got_out, got_lse = merge_sinks(out, lse, sinks)
    want_out, want_lse = merge_states(parts, lses)
    torch.testing.assert_close(got_out, want_out, atol=1e-6, rtol=0)
    torch.testing.assert_close(got_lse, want_lse, atol=4e-6, rtol=0)
    none = torch.full((3,), -torch.inf)
    assert torch.equal(merge_sinks(out, lse, none)[0], out)
    lse[0, 0] = torch.nan
    assert merge_sinks(out, lse, sinks)[0][0, 0].isnan().all(), "a fault is not hidden"
    with pytest.raises(ValueError, match="sinks"):
        merge_sinks(out, lse, sinks[:2])
