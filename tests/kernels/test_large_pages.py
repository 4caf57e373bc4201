"""Weights that are moved next to each other keep their values, also where they are shared."""

from __future__ import annotations

import torch

from kvmesh.kernels.linear import (
    PackedWeight,
    WeightFormat,
    linear,
    move_to_large_pages,
    pack,
    unpack,
)


def test_moved_weights_are_the_same_and_next_to_each_other() -> None:
    torch.manual_seed(0)
    kinds: tuple[WeightFormat, ...] = ("int4", "int8", "exact")
    values = [torch.randn(9, 70) for _ in kinds]
    weights = [pack(value, kind) for value, kind in zip(values, kinds, strict=True)]
    want = [(unpack(weight), linear(torch.ones(2, 70), weight)) for weight in weights]
    shared = weights[1]
    move_to_large_pages([*weights, shared])
    for weight, (whole, product) in zip(weights, want, strict=True):
        assert unpack(weight).equal(whole)
        assert linear(torch.ones(2, 70), weight).equal(product)
    assert shared.codes.data_ptr() == weights[1].codes.data_ptr()
    addresses = [address for weight in weights for address in addresses_of(weight)]
    assert addresses == sorted(addresses)
    assert addresses[-1] - addresses[0] < 9 * 96 * 8
    assert not any(address % 64 for address in addresses)


def addresses_of(weight: PackedWeight) -> list[int]:
    scales = [] if weight.scales is None else [weight.scales.data_ptr()]
    return [weight.codes.data_ptr(), *scales]


def test_no_weights_are_no_error() -> None:
    move_to_large_pages([])
