"""`nuq4`, `nuq3`, `nuq2`: calibrated levels, separate outliers, keys before RoPE."""

from __future__ import annotations

import pytest
import torch

from benchmarks.stand_in_params import levels_for, nuq_keys, params_for
from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.formats.base import LayerParams, PageShape, Params
from kvmesh.kernels.formats.comparison.nuq.side import NonUniform
from kvmesh.kernels.formats.packing import packed_bytes
from kvmesh.kernels.formats.registry import get_format
from tests.kernels.cases import Shape, make_case, truth
from tests.kernels.test_formats import hard_rows

NAMES = ("nuq4", "nuq3", "nuq2")
# Maximum relative squared errors of normal numbers on the levels of `levels_for`.
MSE = {4: 0.013, 3: 0.05, 2: 0.25}
ROPES = [
    pytest.param({}, id="halves"),
    pytest.param({"interleaved": True}, id="interleaved"),
    pytest.param({"rotary_dim": 16}, id="partial"),
    pytest.param({"rotary_dim": 16, "interleaved": True}, id="partial-interleaved"),
]


def rotated(x: torch.Tensor, positions: torch.Tensor, params: Params) -> torch.Tensor:
    """RoPE in fp64, channel by channel. x [..., tokens, head_dim]; positions [..., tokens]"""
    inv_freq = params["inv_freq"].double()
    out = x.double().clone()
    for plane in range(len(inv_freq)):
        a, b = (
            (2 * plane, 2 * plane + 1) if params["interleaved"] else (plane, plane + len(inv_freq))
        )
        angle = positions.double() * inv_freq[plane]
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return out.float()


@pytest.mark.parametrize(
    ("name", "head_dim", "bits"),
    [("nuq4", 64, 4.504), ("nuq3", 64, 3.504), ("nuq2", 64, 2.504), ("nuq4", 128, 4.44)],
)
def test_bits(name: str, head_dim: int, bits: float) -> None:
    assert get_format(name).bits_per_element(64, head_dim) == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_keys_before_rope(name: str, rope: dict[str, object]) -> None:
    """The same keys get the same codes anywhere in a sequence; rotated keys would not."""
    fmt = get_format(name)
    params = params_for(fmt, 2, 64, **rope)
    plain = torch.randn(1, 2, 16, 64)
    pages, firsts = [], torch.tensor([0, 16, 4096, 1_000_000])
    for first in firsts:
        at = first + torch.arange(16)
        keys = rotated(plain, at, params.k)
        pages.append(fmt.encode(keys, plain, params, first.view(1)))
        got, _ = fmt.decode(pages[-1], 16, 64, torch.float32, params)
        error = (got - keys).square().mean() / plain.square().mean()
        assert error < MSE[fmt.k_bits]
    size = packed_bytes(fmt.k_bits, 16, 64)
    for page, first in zip(pages, firsts, strict=True):
        # A number exactly on a bound may fall to either side.
        assert (page[..., :size] != pages[0][..., :size]).float().mean() < 0.01
        end = fmt.k.num_bytes(16, 64)
        stored = page[..., end - 4 : end].contiguous().view(torch.int32)
        assert (stored == first).all()


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
def test_attention_matches_the_expected_results(rope: dict[str, object]) -> None:
    fmt = get_format("nuq4")
    params = params_for(fmt, 2, 64, **rope)
    case = make_case(fmt, Shape(sink_pages=1), [(130, 1), (75, 1), (90, 20)], params=params)
    out, lse = paged_attention(
        case.q, case.hot, case.sealed, case.batch, fmt=fmt, scale=0.125, params=params
    )
    want_out, want_lse = truth(case, scale=0.125)
    assert (out.double() - want_out).abs().max() < 1e-5
    assert (lse.double() - want_lse).abs().max() < 1e-5


def test_a_factor_of_the_rotated_channels_is_kept() -> None:
    """YaRN multiplies rotated keys by a factor, which the calibrated ranges include."""
    fmt = get_format("nuq4")
    params = params_for(fmt, 1, 64)
    wider = LayerParams(
        {**params.k, "scale": params.k["scale"] * 1.25, "zero": params.k["zero"] * 1.25}, params.v
    )
    plain = torch.randn(1, 1, 16, 64)
    first = torch.tensor([320])
    keys = rotated(plain, first + torch.arange(16), params.k)
    page = fmt.encode(keys, plain, params, first)
    scaled = fmt.encode(keys * 1.25, plain, wider, first)
    size = packed_bytes(4, 16, 64)
    assert (page[..., :size] != scaled[..., :size]).float().mean() < 0.01
    got, _ = fmt.decode(scaled, 16, 64, torch.float32, wider)
    assert (got - keys * 1.25).square().mean() < 1.25**2 * MSE[4]


@pytest.mark.parametrize(("head_dim", "count"), [(48, 1), (64, 1), (80, 1), (128, 2), (256, 4)])
@pytest.mark.parametrize("values", [False, True])
def test_the_largest_numbers_are_stored_exactly(head_dim: int, count: int, values: bool) -> None:
    side = NonUniform(2, values=values)
    assert side.outliers(head_dim) == count
    params = levels_for(2) if values else {**levels_for(2), **nuq_keys(1, head_dim)}
    x = torch.randn(1, 1, 16, head_dim)
    at = torch.stack([torch.randperm(head_dim)[:count] for _ in range(16)])[None, None]
    huge = torch.randn(at.shape).sign() * torch.empty(at.shape).uniform_(900, 1100)
    x = x.scatter(-1, at, huge.bfloat16().float())
    first = torch.tensor([0])
    keys = x if values else rotated(x, torch.arange(16), params)
    data = side.codec().encode(side, keys, params, first)
    got = side.codec().decode(side, data, PageShape(16, head_dim, torch.float32), params)
    if not values:
        got = rotated(got, -torch.arange(16), params)
    # Applying and undoing RoPE rounds, which may change the last bit that bf16 keeps.
    assert ((got - x).gather(-1, at).abs() <= (0.0 if values else 4.01)).all()
    rest = torch.ones_like(x).scatter(-1, at, 0.0)
    error = ((got - x).square() * rest).sum() / (x.square() * rest).sum()
    assert error < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_a_head_with_outlier_channels_does_not_harm_another(name: str) -> None:
    fmt = get_format(name)
    x = torch.randn(2, 2, 16, 64)
    x[:, 0, :, 5] *= 1000.0
    params = params_for(fmt, 2, 64)
    params.k["scale"][0, 5] *= 1000.0  # as calibration would find it
    params.k["importance"].fill_(1.0)
    at = torch.tensor([0, 16])
    keys = torch.cat([rotated(x[i : i + 1], at[i] + torch.arange(16), params.k) for i in range(2)])
    got_k, got_v = fmt.decode(fmt.encode(keys, x, params, at), 16, 64, torch.float32, params)
    got_k = torch.cat(
        [rotated(got_k[i : i + 1], -at[i] - torch.arange(16), params.k) for i in (0, 1)]
    )
    for got in (got_k, got_v):
        error = (got - x).square()
        assert error[:, 1].mean() < MSE[fmt.k_bits]
        rest = torch.arange(64) != 5
        # The token's only outlier is taken: the rest is as without any.
        assert error[:, 0][..., rest].mean() < 1.5 * MSE[fmt.k_bits]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", NAMES)
def test_hard_rows_stay_finite_at_any_position(name: str, rope: dict[str, object]) -> None:
    fmt = get_format(name)
    params = params_for(fmt, 1, 64, **rope)
    for rows in (hard_rows(), hard_rows().repeat(4, 4).T[:, :64].contiguous()):
        page = rows[None, None]
        for first in (0, 1008, 999_936):
            pages = fmt.encode(page, page, params, torch.tensor([first]))
            for got in fmt.decode(pages, rows.shape[0], rows.shape[1], torch.float32, params):
                assert got.isfinite().all()


def test_ordinary_rows_far_from_zero_keep_their_mean() -> None:
    side = NonUniform(4, values=True)
    params = levels_for(4)
    x = 3.0 + torch.rand(1, 1, 16, 64)
    pages = side.codec().encode(side, x, params, None)
    got = side.codec().decode(side, pages, PageShape(16, 64, torch.float32), params)
    assert (got - x).square().mean().sqrt() < 0.15


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"width: expected one of \(2, 3, 4\), got 8"):
        NonUniform(8)
    with pytest.raises(ValueError, match="head_dim: expected 2 to 256"):
        NonUniform(4).num_bytes(64, 512)
    fmt = get_format("nuq4")
    k = torch.randn(2, 1, 16, 64)
    with pytest.raises(ValueError, match=r"positions: nuq4 needs the first positions of 2 pages"):
        fmt.encode(k, k, params_for(fmt, 1, 64))
