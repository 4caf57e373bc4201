"""Properties of every KV format and of each kind of side."""

from __future__ import annotations

import math
import subprocess
import sys
from random import Random

import pytest
import torch
from hypothesis import given

from benchmarks.stand_in_params import params_for
from kvmesh.kernels.formats.affine import reference
from kvmesh.kernels.formats.affine.side import Affine
from kvmesh.kernels.formats.base import KVFormat, PageShape, Side
from kvmesh.kernels.formats.codebook.side import Codebook
from kvmesh.kernels.formats.comparison.grouped.side import Grouped
from kvmesh.kernels.formats.comparison.turboquant.side import LloydMax
from kvmesh.kernels.formats.exact.side import Exact
from kvmesh.kernels.formats.packing import pack, packed_bytes, unpack
from kvmesh.kernels.formats.registry import format_names, format_of_name, get_format
from kvmesh.kernels.formats.rotation import Rotation, rotation_matrix
from kvmesh.kernels.formats.scales import load_scale, store_scale
from tests.exercised import Exercised
from tests.scenarios import SEEDS, scenarios

PER_TOKEN = ("int8", "int4")


def test_names_and_aliases() -> None:
    assert len(set(format_names())) == len(format_names())
    assert get_format(0) is get_format("exact")
    assert get_format(8) is get_format("8") is get_format(" INT8 ")
    assert get_format(4) is get_format("int4")
    assert get_format(42) is get_format("k4v2")
    with pytest.raises(ValueError, match=r"'int3'.*exact, int8, .*int4"):
        get_format("int3")


def test_sizes_need_no_torch() -> None:
    code = (
        "import sys; from kvmesh.kernels.formats.registry import get_format as g;"
        "print([g(n).page_bytes(64, 64) for n in ('exact', 'int8', 'int4')]);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[16384, 8704, 4608]"


@pytest.mark.parametrize(
    ("name", "head_dim", "bits"),
    [
        ("int8", 64, 8.5),
        ("int8", 128, 8.25),
        ("int4", 64, 4.5),
        ("int4", 128, 4.25),
        ("kivi4", 128, 5.0),
        ("kivi2", 64, 3.0),
        ("g64-int4", 128, 4.5),
        ("g64-hqq2", 64, 2.5),
    ],
)
def test_published_bits(name: str, head_dim: int, bits: float) -> None:
    assert get_format(name).bits_per_element(64, head_dim) == bits
    assert get_format(name).bits_per_element(128, head_dim, dtype_bytes=4) == bits


@pytest.mark.parametrize(
    ("name", "max_bits"),
    [("k4v4", 4.4), ("k4v2", 3.3), ("k3v3", 3.3), ("k3v2", 2.75), ("k2v2", 2.3)],
)
def test_our_formats_stay_within_their_widths(name: str, max_bits: float) -> None:
    assert get_format(name).bits_per_element(64, 64) <= max_bits
    assert get_format(name).bits_per_element(64, 128) <= max_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 64), (64, 80), (128, 128)])
def test_round_trip(name: str, dtype: torch.dtype, page_size: int, head_dim: int) -> None:
    fmt = get_format(name)
    k, v = torch.randn(2, 3, 2, page_size, head_dim).to(dtype)
    params = params_for(fmt, 2, head_dim)
    pages = fmt.encode(k, v, params, torch.arange(3) * page_size)
    assert pages.shape == (3, 2, fmt.page_bytes(page_size, head_dim, dtype.itemsize))
    decoded = fmt.decode(pages, page_size, head_dim, dtype, params)
    for x, got, side in zip((k, v), decoded, (fmt.k, fmt.v), strict=True):
        assert got.shape == x.shape
        assert got.dtype == dtype
        # The smallest squared error for a Gaussian, by bits; a sign per number adds about a bit.
        sign = isinstance(side, LloydMax) and side.residual != ""
        most = {0: 0.0, 8: 1e-3, 4: 0.014, 3: 0.2 if sign else 0.045, 2: 0.25}[side.width]
        error = (got.float() - x.float()).square().mean() / x.float().square().mean()
        assert error <= most


@pytest.mark.parametrize("name", PER_TOKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_on_a_grid_is_at_most_half_a_step(name: str, dtype: torch.dtype) -> None:
    fmt = get_format(name)
    k, v = torch.randn(2, 3, 2, 64, 80).to(dtype)
    for x, got in zip((k, v), fmt.decode(fmt.encode(k, v), 64, 80, dtype), strict=True):
        x, got = x.float(), got.float()
        step = (x.amax(-1) - x.amin(-1)) / (2**fmt.k_bits - 1)
        rounding = 2**-8 * x.abs().amax() if dtype == torch.bfloat16 else 1e-6
        assert ((got - x).abs().amax(-1) <= 0.51 * step * (1 + 2**-6) + rounding).all()


def relative_error(side: Side, x: torch.Tensor) -> float:
    shape = PageShape(x.shape[-2], x.shape[-1], torch.float32)
    got = side.codec().decode(side, side.codec().encode(side, x, {}, None), shape, {})
    return float((got - x).square().sum() / x.square().sum())


@pytest.mark.parametrize(("width", "mse"), [(2, 0.11748), (3, 0.03455), (4, 0.00950)])
def test_lloyd_max_has_the_published_error(width: int, mse: float) -> None:
    """For N(0, 1) numbers of known deviation: the tables of Max (1960), to 1%."""
    side = LloydMax(width)
    # Long rows, whose root mean square is close to that of the distribution.
    x = torch.randn(4, 4, 16, 8192, generator=torch.Generator().manual_seed(0))
    assert relative_error(side, x) == pytest.approx(mse, rel=0.01)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lloyd_max_on_the_sphere_has_the_published_error(head_dim: int) -> None:
    """In rows of head_dim numbers: .1160/.03397/.00932 at 128 and .1145/.03339/.00913 at 64."""
    exact = {128: (0.1160, 0.03397, 0.00932), 64: (0.1145, 0.03339, 0.00913)}[head_dim]
    x = torch.randn(64, 8, 64, head_dim, generator=torch.Generator().manual_seed(1))
    for width, mse in zip((2, 3, 4), exact, strict=True):
        side = LloydMax(width)
        assert relative_error(side, x) == pytest.approx(mse, rel=0.01)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_eden_scale_is_unbiased(width: int) -> None:
    """<x, x^> = |x|², up to the rounding of the scale; least squares would give less."""
    x = torch.randn(2, 2, 64, 128, generator=torch.Generator().manual_seed(2))
    side = Codebook(width)
    pages = side.codec().encode(side, x, {}, None)
    got = side.codec().decode(side, pages, PageShape(64, 128, torch.float32), {})
    slope = (x * got).sum(-1) / x.square().sum(-1)
    torch.testing.assert_close(slope, torch.ones_like(slope), atol=2**-8, rtol=0)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("along", ["token", "channel"])
def test_fitting_beats_the_range(width: int, along: str) -> None:
    x = torch.randn(4, 2, 64, 64, generator=torch.Generator().manual_seed(3))
    fitted = relative_error(Affine(width, along=along, fit="least_squares"), x)
    half_quadratic = relative_error(Grouped(width, along=along, fit="half_quadratic"), x)
    assert fitted < half_quadratic < relative_error(Affine(width, along=along), x)
    # A one-byte scale costs little accuracy.
    byte = relative_error(Affine(width, along=along, fit="least_squares", scale="e5m3"), x)
    assert byte < 1.06 * fitted


def test_an_outlier_does_not_affect_its_neighbours() -> None:
    """Outlier channels a thousand times as large as the rest: keys keep the rest accurate."""
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    x[..., 5] *= 1000.0
    rest = torch.arange(64) != 5
    for name in ("k4v4", "k3v2", "k2v2", "kivi4"):
        fmt = get_format(name)
        got, _ = fmt.decode(fmt.encode(x, x), 64, 64, torch.float32)
        error = (got - x)[..., rest].square().mean() / x[..., rest].square().mean()
        assert error < {4: 0.01, 3: 0.04, 2: 0.16}[fmt.k_bits]


@pytest.mark.parametrize("head_dim", [2, 48, 64, 80, 96, 128])
def test_rotations_are_orthonormal_and_spread(head_dim: int) -> None:
    matrix = rotation_matrix(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=1e-6, rtol=0)
    largest = 1 << (head_dim.bit_length() - 1)
    assert (matrix[:largest, 0].abs() - largest**-0.5).abs().max() < 1e-6
    constant = matrix @ torch.ones(head_dim)
    assert head_dim == 2 or constant.abs().max() < 0.9 * math.sqrt(head_dim)


@pytest.mark.parametrize("head_dim", [2, 64, 80, 256])
@pytest.mark.parametrize("tokens", [0, 1, 200])
def test_rotating_equals_a_product_with_the_matrix(head_dim: int, tokens: int) -> None:
    """For few and many vectors, for a view, and back again."""
    cpu = torch.device("cpu")
    matrix, there = rotation_matrix(head_dim), Rotation.of(head_dim, torch.float32, cpu)
    x = torch.randn(tokens, 7, head_dim)[:, 2:5]
    rotated, before = there(x), x.clone()
    torch.testing.assert_close(rotated, (x.double() @ matrix.double().T).float())
    torch.testing.assert_close(Rotation.of(head_dim, torch.float32, cpu, back=True)(rotated), x)
    assert x.equal(before)
    halves = Rotation.of(head_dim, torch.bfloat16, cpu)(x.bfloat16())
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), rotated, atol=0.05, rtol=0.05)


def test_a_rotated_vector_has_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with threads, and where its gradient is not wanted."""
    rotation = Rotation.of(80, torch.float32, torch.device("cpu"))
    x = torch.randn(30, 5, 80)
    whole = rotation(x)
    assert all(rotation(x[token]).equal(whole[token]) for token in range(30))
    monkeypatch.setattr("kvmesh.kernels.formats.rotation_numba.MIN_NUMBERS_PER_THREAD", 80)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert rotation(x).equal(whole)
    torch.testing.assert_close(rotation(x.requires_grad_()), whole)


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("run", [16, 64, 100])
def test_least_squares_of_a_loop_are_those_of_plain_torch(
    width: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid of each run has the same error, also where one number is far away from the others,
    or all are equal; and the same bits in any batch."""
    x = torch.randn(12, run, generator=torch.Generator().manual_seed(7))
    x[1] += 100.0
    x[2, 3], x[3] = 1e4, 2.5
    levels = 2.0**width - 1
    steps, mean, _, _ = reference.in_steps(x * 0.5, levels)

    def errors() -> torch.Tensor:
        a, code_mean = reference._line(steps, mean, levels, 0.9)
        b = mean - a * code_mean
        codes = ((steps - b) / a).round().clamp(0, levels)
        return (steps - codes * a - b).square().mean(-1)

    found = reference._line(steps, mean, levels, 0.9)
    for one in range(len(x)):
        alone = reference._line(steps[one : one + 1], mean[one : one + 1], levels, 0.9)
        assert all(a.equal(b[one : one + 1]) for a, b in zip(alone, found, strict=True))
    by_loop = errors()
    monkeypatch.setattr(reference, "has_loops", lambda _tensor: False)
    plain = reference._line(steps, mean, levels, 0.9)
    assert not all(a.equal(b) for a, b in zip(found, plain, strict=True)), "no loop was used"
    torch.testing.assert_close(by_loop, errors(), atol=1e-6, rtol=0.02)


def test_an_odd_head_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match=r"head_dim.*even number, got 65"):
        rotation_matrix(65)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 64), (64, 80), (128, 128)])
def test_unpacking_inverts_packing(width: int, values: bool, page_size: int, head_dim: int) -> None:
    if width == 1 and not values:
        return  # signs of residuals are packed like values
    codes = torch.randint(0, 2**width, (3, 2, page_size, head_dim)).to(torch.uint8)
    data = pack(codes, width, values=values)
    assert data.shape == (3, 2, packed_bytes(width, page_size, head_dim))
    got = unpack(torch.cat((data, data[..., :5]), -1), width, page_size, head_dim, values=values)
    assert torch.equal(got, codes)


def test_byte_scales_round_to_nearest() -> None:
    scales = torch.logspace(-6, 3.5, 1000)
    got = load_scale(store_scale(scales, "e5m3"), "e5m3")
    assert ((got / scales - 1).abs() <= 1 / 16 + 1e-6).all()
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(store_scale(load_scale(every, "e5m3"), "e5m3"), every)
    ends = load_scale(store_scale(torch.tensor([1e-30, 1e30]), "e5m3"), "e5m3")
    assert ends.tolist() == [2.0**-20, 3840.0]


def test_sides_are_checked() -> None:
    with pytest.raises(ValueError, match="width"):
        Affine(5)
    with pytest.raises(ValueError, match="fit"):
        Affine(4, fit="guess")
    with pytest.raises(ValueError, match=r"fit: expected one of \('range', 'half_quadratic'\)"):
        Grouped(4, fit="least_squares")
    with pytest.raises(ValueError, match=r"width: expected one of \(2, 3, 4\), got 8"):
        Codebook(8)
    with pytest.raises(ValueError, match="residual"):
        LloydMax(4, residual="fancy")
    with pytest.raises(ValueError, match="x: set values=True"):
        KVFormat("x", Exact(), Exact(), "")
    with pytest.raises(ValueError, match="head_dim: 3-bit codes need a multiple of 8, got 20"):
        get_format("k3v2").page_bytes(64, 20)
    with pytest.raises(ValueError, match=r"head_dim: expected an even number, got 65"):
        get_format("int8").page_bytes(64, 65)


def test_relative_mse_matches_the_published_one() -> None:
    """Gaussian rows at head_dim 128: .0100 for int4, as published for LMDeploy's."""
    k = torch.randn(64, 1, 64, 128, generator=torch.Generator().manual_seed(0))
    for name, want in (("int4", 0.0100), ("int8", 0.0100 * (15 / 255) ** 2)):
        fmt = get_format(name)
        got, _ = fmt.decode(fmt.encode(k, k), 64, 128, torch.float32)
        mse = (got - k).square().sum() / k.square().sum()
        assert mse == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("name", format_names())
def test_bytes_depend_only_on_the_page(name: str) -> None:
    fmt = get_format(name)
    k, v = torch.randn(2, 7, 3, 32, 80)
    params, at = params_for(fmt, 3, 80), torch.arange(7) * 32
    together = fmt.encode(k, v, params, at)
    for page in range(7):
        one = slice(page, page + 1)
        assert torch.equal(together[page], fmt.encode(k[one], v[one], params, at[one])[0])
    shuffled = torch.randperm(7)
    again = fmt.encode(k[shuffled], v[shuffled], params, at[shuffled])
    assert torch.equal(together[shuffled], again)


def hard_rows() -> torch.Tensor:
    """[16, 64] bf16: inputs that break a careless quantiser, one per row."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(1))
    rows = [
        torch.zeros(64),
        torch.full((64,), 7.25),
        torch.full((64,), -3e38),
        noise * 1e-40,
        noise.sign() * 3.38e38,
        noise * 1e38,
        100 + noise.abs(),
        -1000 - noise.abs(),
        torch.cat((torch.tensor([3000.0]), noise[1:])),
        noise * 1e-20,
        torch.cat((torch.tensor([3.38e38, 1e-40]), torch.zeros(62))),
        -noise.abs() * 1e30,
        noise.abs() * 1e-38,
        torch.full((64,), 1e-41),
        torch.full((64,), 2.0**-126),
        noise,
    ]
    return torch.stack(rows).bfloat16()


@pytest.mark.parametrize("name", PER_TOKEN)
def test_hard_rows_stay_finite_and_precise(name: str) -> None:
    fmt = get_format(name)
    rows = hard_rows()
    page = rows[None, None]
    got = fmt.decode(fmt.encode(page, page), 16, 64, torch.float32)[0][0, 0]
    x = rows.double()
    assert got.isfinite().all()
    step = ((x.amax(-1) - x.amin(-1)) / (2**fmt.k_bits - 1)).clamp_min(2.0**-125)
    error = (got.double() - x).abs().amax(-1)
    assert (error <= 0.505 * step * (1 + 2**-6) + 1e-7 * x.abs().amax(-1)).all()
    constant = x.amax(-1) == x.amin(-1)
    assert constant.sum() == 5
    assert torch.equal(got[constant], rows[constant].float())


@pytest.mark.parametrize("name", format_names())
def test_hard_rows_stay_finite(name: str) -> None:
    """In every format, as rows and as columns; rows without extremes also stay accurate."""
    fmt = get_format(name)
    rows = hard_rows()
    for x in (rows, rows.repeat(4, 1).T.contiguous(), rows[-1:].repeat(16, 1)):
        page = x[None, None]
        params, at = params_for(fmt, 1, x.shape[-1]), torch.tensor([64])
        for dtype in (torch.float32, torch.bfloat16):
            pages = fmt.encode(page.to(dtype), page.to(dtype), params, at)
            for side in fmt.decode(pages, x.shape[0], x.shape[1], dtype, params):
                assert side.isfinite().all()


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_page_that_is_not_finite_is_sealed_and_changes_no_other(name: str, value: float) -> None:
    fmt = get_format(name)
    pages = torch.randn(4, 1, 16, 64, generator=torch.Generator().manual_seed(3))
    params, at = params_for(fmt, 1, 64), torch.arange(4) * 16
    sound = fmt.encode(pages, pages, params, at)
    pages[1] = value
    pages[2, 0, 5, 7] = value
    sealed = fmt.encode(pages, pages, params, at)
    fmt.decode(sealed, 16, 64, torch.float32, params)
    assert torch.equal(sealed[[0, 3]], sound[[0, 3]])


def test_turboquants_correction_is_the_residual_on_average() -> None:
    """Each of its numbers is noisy, but it has the direction and the length."""
    page = torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(3))
    decoded = []
    for side in (LloydMax(3), LloydMax(3, residual="qjl")):
        pages = side.codec().encode(side, page, {}, None)
        shape = PageShape(64, 64, torch.float32)
        decoded.append(side.codec().decode(side, pages, shape, {}))
    residual, correction = page - decoded[0], decoded[1] - decoded[0]
    share = (correction * residual).sum(-1) / residual.square().sum(-1)
    assert share.mean() == pytest.approx(1.0, abs=0.05)


def test_keys_are_coded_around_the_centre_that_is_stored() -> None:
    """It is stored in bf16; what that rounds away is left for the codes."""
    channels = 1000.0 + torch.arange(64) * 0.37
    page = channels.expand(1, 1, 16, 64).contiguous()
    fmt = get_format("fp8")
    keys = fmt.decode(fmt.encode(page, page), 16, 64, torch.float32)[0]
    rounded_away = (channels - channels.bfloat16().float()).abs()
    assert rounded_away.max() > 1.5
    assert ((keys - page).abs() <= rounded_away / 8 + rounded_away.max() / 448).all()


SEEN = Exercised(
    "rows of two numbers",
    {"equal": 12, "of both signs": 30, "far apart": 40, "subnormal": 3, "huge": 12},
)


def any_number(chance: Random) -> float:
    """Of any magnitude that fp32 has, normal or not."""
    return chance.choice([-1, 1]) * chance.uniform(1, 2) * 2.0 ** chance.randrange(-149, 127)


@SEEN.required
@scenarios(200)
@given(seed=SEEDS)
def test_any_two_numbers_in_a_row(seed: int) -> None:
    chance = Random(seed)
    fmt = get_format(chance.choice(PER_TOKEN))
    one = any_number(chance)
    close = chance.choice([0.0, one, one * chance.uniform(-2, 2)])
    numbers = [one, chance.choice([close, any_number(chance)])]
    smaller, larger = sorted(map(abs, numbers))
    SEEN.add("equal", numbers[0] == numbers[1])
    SEEN.add("of both signs", numbers[0] * numbers[1] < 0)
    SEEN.add("far apart", larger > 1e6 * smaller > 0)
    SEEN.add("subnormal", larger < 2.0**-126)
    SEEN.add("huge", larger > 1e30)
    row = torch.tensor(numbers).bfloat16()
    row = torch.where(row.isfinite(), row, 0.0).repeat(1, 1, 16, 8)
    got, _ = fmt.decode(fmt.encode(row, row), 16, 16, torch.float32)
    x = row.double()
    step = ((x.amax() - x.amin()) / (2**fmt.k_bits - 1)).clamp_min(2.0**-125)
    assert (got.double() - x).abs().max() <= 0.505 * step * (1 + 2**-6) + 1e-7 * x.abs().max()


def test_fp32_rows_far_from_zero_lose_less_than_bf16_would() -> None:
    fmt = get_format("int4")
    row = 1000 + torch.rand(1, 1, 16, 64, generator=torch.Generator().manual_seed(2))
    got, _ = fmt.decode(fmt.encode(row, row), 16, 64, torch.float32)
    assert (got - row).abs().max() < (row.bfloat16().float() - row).abs().max()


def test_bad_arguments_are_named() -> None:
    fmt = get_format("int8")
    with pytest.raises(ValueError, match="k, v"):
        fmt.encode(torch.zeros(16, 64), torch.zeros(16, 32))
    with pytest.raises(ValueError, match="pages"):
        fmt.decode(torch.zeros(10, dtype=torch.uint8), 16, 64, torch.float32)
    with pytest.raises(ValueError, match="head_dim"):
        fmt.page_bytes(16, 63)


@pytest.mark.parametrize(
    ("name", "values_in_keys", "meant"),
    [
        ("default", 0, "k8v4"),
        ("Default", 0, "k8v4"),
        ("default", 512, "int8"),
        ("42", 0, "k4v2"),
    ],
)
def test_a_name_means_a_format_of_the_model(name: str, values_in_keys: int, meant: str) -> None:
    fmt = format_of_name(name, values_in_keys)
    assert (fmt.name, fmt.values_in_keys) == (meant, values_in_keys)
