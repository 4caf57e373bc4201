"""What every KV format must hold, and what `int8` and `int4` are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.kernels.formats.per_token.format import PerTokenFormat
from kvmesh.kernels.formats.registry import format_names, get_format

PER_TOKEN = ("int8", "int4")


def test_names_and_aliases() -> None:
    assert format_names() == ("exact", "int8", "int4")
    assert get_format(0) is get_format("exact")
    assert get_format(8) is get_format("8") is get_format(" INT8 ")
    assert get_format(4) is get_format("int4")
    with pytest.raises(ValueError, match=r"'int3'.*exact, int8, int4"):
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
    [("int8", 64, 8.5), ("int8", 128, 8.25), ("int4", 64, 4.5), ("int4", 128, 4.25)],
)
def test_published_bits(name: str, head_dim: int, bits: float) -> None:
    assert get_format(name).bits_per_element(64, head_dim) == bits
    assert get_format(name).bits_per_element(16, head_dim, dtype_bytes=4) == bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 64), (64, 80), (128, 128)])
def test_round_trip(name: str, dtype: torch.dtype, page_size: int, head_dim: int) -> None:
    fmt = get_format(name)
    k, v = torch.randn(2, 3, 2, page_size, head_dim).to(dtype)
    pages = fmt.encode(k, v)
    assert pages.shape == (3, 2, fmt.page_bytes(page_size, head_dim, dtype.itemsize))
    for x, decoded in zip((k, v), fmt.decode(pages, page_size, head_dim, dtype), strict=True):
        assert decoded.shape == x.shape
        assert decoded.dtype == dtype
        if name == "exact":
            assert torch.equal(decoded, x)
            continue
        x, decoded = x.float(), decoded.float()
        step = (x.amax(-1) - x.amin(-1)) / (2**fmt.k_bits - 1)
        rounding = 2**-8 * x.abs().amax() if dtype == torch.bfloat16 else 1e-6
        assert ((decoded - x).abs().amax(-1) <= 0.51 * step * (1 + 2**-6) + rounding).all()


def test_relative_mse_is_that_of_the_method() -> None:
    """Gaussian rows at head_dim 128: .0100 for int4, as published for LMDeploy's."""
    k = torch.randn(64, 64, 128, generator=torch.Generator().manual_seed(0))
    for name, want in (("int4", 0.0100), ("int8", 0.0100 * (15 / 255) ** 2)):
        fmt = get_format(name)
        got, _ = fmt.decode(fmt.encode(k, k), 64, 128, torch.float32)
        mse = (got - k).square().sum() / k.square().sum()
        assert mse == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_bytes_depend_on_the_page_alone(name: str) -> None:
    fmt = get_format(name)
    k, v = torch.randn(2, 7, 3, 32, 80)
    together = fmt.encode(k, v)
    for page in range(7):
        assert torch.equal(together[page], fmt.encode(k[page], v[page]))
    shuffled = torch.randperm(7)
    assert torch.equal(together[shuffled], fmt.encode(k[shuffled], v[shuffled]))


def hard_rows() -> torch.Tensor:
    """[16, 64] bf16: what breaks a careless quantiser, a row each."""
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
    got, _ = fmt.decode(fmt.encode(rows, rows), 16, 64, torch.float32)
    x = rows.double()
    assert got.isfinite().all()
    step = ((x.amax(-1) - x.amin(-1)) / (2**fmt.k_bits - 1)).clamp_min(2.0**-125)
    error = (got.double() - x).abs().amax(-1)
    assert (error <= 0.505 * step * (1 + 2**-6) + 1e-7 * x.abs().amax(-1)).all()
    constant = x.amax(-1) == x.amin(-1)
    assert constant.sum() == 5
    assert torch.equal(got[constant], rows[constant].float())


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2),
    st.sampled_from(PER_TOKEN),
)
def test_any_two_numbers_in_a_row(numbers: list[float], name: str) -> None:
    fmt = get_format(name)
    row = torch.tensor(numbers).bfloat16()
    row = torch.where(row.isfinite(), row, 0.0).repeat(16, 8)
    got, _ = fmt.decode(fmt.encode(row, row), 16, 16, torch.float32)
    x = row.double()
    step = ((x.amax() - x.amin()) / (2**fmt.k_bits - 1)).clamp_min(2.0**-125)
    assert (got.double() - x).abs().max() <= 0.505 * step * (1 + 2**-6) + 1e-7 * x.abs().max()


def test_fp32_rows_far_from_zero_lose_less_than_bf16_would() -> None:
    fmt = get_format("int4")
    row = 1000 + torch.rand(16, 64, generator=torch.Generator().manual_seed(2))
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
    with pytest.raises(ValueError, match="k_bits"):
        PerTokenFormat(name="int3", k_bits=3, v_bits=3)
