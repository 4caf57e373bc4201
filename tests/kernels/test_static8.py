"""`int8-static`: calibrated ranges."""

from __future__ import annotations

import pytest
import torch

from benchmarks.stand_in_params import params_for
from kvmesh.kernels.formats.comparison.static8.side import Static8
from kvmesh.kernels.formats.registry import get_format

NAMES = ("int8-static", "int8-static-layer")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_page_holds_only_codes(name: str, head_dim: int) -> None:
    assert get_format(name).bits_per_element(64, head_dim) == 8.0


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_half_a_step_within_the_range_and_numbers_outside_are_clipped(
    name: str,
) -> None:
    fmt = get_format(name)
    params = params_for(fmt, 2, 64)
    zero, scale = params.k["zero"].unsqueeze(1), params.k["scale"].unsqueeze(1)
    x = zero + scale * torch.empty(3, 2, 16, 64).uniform_(-127.5, 127.4)
    for got in fmt.decode(fmt.encode(x, x, params), 16, 64, torch.float32, params):
        assert ((got - x).abs() <= 0.5 * scale * (1 + 1e-4)).all()
    far = x.sign() * 1e6
    for got in fmt.decode(fmt.encode(far, far, params), 16, 64, torch.float32, params):
        torch.testing.assert_close(got, zero + scale * torch.where(far > 0, 127.0, -128.0))


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="per: expected channel or layer, got 'head'"):
        Static8(per="head")
