"""Attention over pages whose values are a part of their keys, on every backend, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvmesh.kernels import workspace
from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_names, format_of_model, get_format
from kvmesh.kernels.write import write_hot
from tests.kernels.cases import Case, Shape, make_case, truth

FORMATS = [name for name in format_names() if get_format(name).treats_sides_alike]
MIXED = [(1, 1), (200, 33), (63, 1), (64, 1), (130, 1), (5, 5)]
# The loops of engines' tests, which are compiled once for all.
SHAPE = Shape(num_heads=5, num_kv_heads=1, head_dim=40)
VALUES = 32


def latent(name: str, values: int = VALUES) -> KVFormat:
    return format_of_model(get_format(name), values)


def check(case: Case, backend: str) -> None:
    """At most twice the error of torch in the same dtype."""
    scale = case.shape.head_dim**-0.5
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    there = case.to(device)
    arguments = (there.q, there.hot, there.sealed, there.batch)
    out, lse = paged_attention(*arguments, fmt=case.fmt, scale=scale, backend=backend)
    want_out, want_lse = truth(case, scale=scale)
    limit = 2 * (truth(case, scale=scale, dtype=case.q.dtype)[0].double() - want_out).abs().max()
    count = len(want_out)
    assert out.shape == (case.q.shape[0], case.shape.num_heads, case.fmt.values_in_keys)
    assert (out[:count].cpu().double() - want_out).abs().max() <= limit + 2e-6
    assert (lse[:count].cpu().double() - want_lse).abs().max() < 1e-5
    assert (out[count:] == 0).all()
    assert (lse[count:] == -torch.inf).all()


@pytest.mark.parametrize("name", FORMATS)
def test_plain_torch(name: str) -> None:
    for windows in ((0, 0), (1, 2)):
        shape = replace(SHAPE, sink_pages=windows[0], recent_pages=windows[1])
        check(make_case(latent(name), shape, MIXED, padding_tokens=2), "reference")


@pytest.mark.slow
def test_compiled_loop() -> None:
    """Of the format whose numbers come with scales and offsets of tokens."""
    shape = replace(SHAPE, sink_pages=1, recent_pages=1)
    check(make_case(latent("int8"), shape, MIXED, padding_tokens=2), "numba")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and channels that are no power of two, and more than one part."""
    monkeypatch.setattr(workspace, "LATENT_PART_TOKENS", 96)
    shape = Shape(5, 1, 72, page_size=48, sink_pages=1, recent_pages=1)
    lengths = [(1, 1), (100, 2), (250, 1), (48, 1)]
    check(make_case(latent(name, 52), shape, lengths, padding_tokens=1), "triton")


@pytest.mark.slow
def test_kernel_with_heads_in_two_blocks() -> None:
    check(make_case(latent("exact"), replace(SHAPE, num_heads=35), [(20, 2), (7, 1)]), "triton")


def test_a_page_has_one_side() -> None:
    fmt = latent("int8")
    assert fmt.page_bytes(16, 40) == get_format("int8").k.num_bytes(16, 40)
    assert fmt.bits_per_element(16, 40) == get_format("int8").k.bits_per_element(16, 40)
    hot = torch.zeros(2, 1, 1, 16, 40)
    key = torch.randn(1, 1, 40)
    write_hot(key, key[..., :VALUES], hot, torch.tensor([18]))
    assert hot[1, 0, 0, 2].equal(key[0, 0])
    assert hot.count_nonzero() == 40


def test_formats_that_treat_values_otherwise_are_refused_by_name() -> None:
    for name in format_names():
        if name not in FORMATS:
            with pytest.raises(ValueError, match=f"{name} stores.* use one of {FORMATS[0]}, "):
                latent(name)
    assert FORMATS == ["exact", "int8", "fp8", "int4"]


def test_pools_of_the_other_kind_are_refused() -> None:
    case = make_case(latent("exact"), SHAPE, [(5, 1)])
    both = make_case(get_format("exact"), SHAPE, [(5, 1)])
    for pools, fmt in ((both, case.fmt), (case, both.fmt)):
        with pytest.raises(ValueError, match="second dimension"):
            paged_attention(pools.q, pools.hot, pools.sealed, pools.batch, fmt=fmt, scale=1.0)
