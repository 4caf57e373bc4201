"""The Triton kernels: in the interpreter and fp32 without a GPU, compiled and bf16 with one.

The interpreter is slow, so each case mixes several odd lengths.
"""

from __future__ import annotations

import pytest
import torch

from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.kernels.merge import merge_states
from kvmesh.kernels.seal import seal_pages
from kvmesh.kernels.write import write_hot
from tests.kernels.cases import Case, Shape, make_case, truth, with_empty_sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]

FORMATS = pytest.mark.parametrize("name", format_names())
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(case: Case, **options: float | None) -> None:
    """FlashAttention's rule: at most twice the error of torch in the same dtype."""
    scale = case.shape.head_dim**-0.5
    on_device = case.to(DEVICE)
    out, lse = paged_attention(
        on_device.q,
        on_device.hot,
        on_device.sealed,
        on_device.batch,
        fmt=case.fmt,
        scale=scale,
        backend="triton",
        **options,
    )
    out, lse = out.cpu(), lse.cpu()
    want_out, want_lse = truth(case, scale=scale, **options)
    same_dtype, _ = truth(case, scale=scale, **options, dtype=case.q.dtype)
    floor = 2e-6 if case.q.dtype == torch.float32 else 1e-4
    limit = 2 * (same_dtype.double() - want_out).abs().max() + floor
    count = want_out.shape[0]
    assert (out[:count].double() - want_out).abs().max() <= limit
    assert (lse[:count].double() - want_lse).abs().max() < (1e-5 if floor < 1e-5 else 2e-2)
    assert (out[count:] == 0).all()
    assert (lse[count:] == -torch.inf).all()


@FORMATS
@EVERY_DTYPE
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "windows"),
    [
        (2, 2, 64, 16, (0, 0)),  # groups of 1
        (6, 2, 80, 32, (1, 1)),  # groups of 3, a head_dim that is no power of two
        (4, 1, 128, 64, (0, 1)),  # groups of 4
        (8, 1, 64, 128, (1, 0)),  # groups of 8
        (3, 1, 64, 48, (2, 2)),  # a page_size that is no power of two
    ],
)
def test_mixed_batch_follows_the_rule(
    name: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    windows: tuple[int, int],
) -> None:
    shape = Shape(heads, kv_heads, head_dim, page_size, *windows)
    lengths = [(1, 1), (64, 23), (page_size, 1)]
    if page_size == 16:
        lengths += [(63, 1), (65, 1)]
    if page_size < 100:  # larger pages take the interpreter too long
        lengths += [(5 * page_size + 3, 1), (3 * page_size + 7, page_size + 9)]
    else:
        lengths += [(2 * page_size + 3, 1), (page_size + 7, 21)]
    check(make_case(get_format(name), shape, lengths, dtype=dtype, padding_tokens=2))


@FORMATS
@EVERY_DTYPE
def test_softcap_and_sliding_window(name: str, dtype: torch.dtype) -> None:
    shape = Shape(3, 1, 64, 16, sink_pages=1, recent_pages=1)
    case = make_case(get_format(name), shape, [(1, 1), (130, 1), (90, 30)], dtype=dtype)
    check(case, softcap=15.0, sliding_window=37)
    check(case, softcap=15.0)
    check(case, sliding_window=1)


@EVERY_DTYPE
def test_sequences_without_a_query_are_padding(dtype: torch.dtype) -> None:
    case = make_case(
        get_format("int8"), Shape(3, 1), [(40, 1), (17, 1)], dtype=dtype, padding_tokens=2
    )
    check(with_empty_sequences(case, 2))


@FORMATS
@EVERY_DTYPE
def test_long_decode_is_split_and_pages_are_shared(name: str, dtype: torch.dtype) -> None:
    shape = Shape(3, 1, 64, 16)
    case = make_case(
        get_format(name), shape, [(1000, 1), (400, 1)], dtype=dtype, shared_prefix_pages=20
    )
    check(case)


@FORMATS
@EVERY_DTYPE
def test_sealing_gives_the_reference_bytes(name: str, dtype: torch.dtype) -> None:
    fmt = get_format(name)
    for head_dim, page_size in ((64, 16), (80, 48)):
        hot = torch.randn(6, 2, 2, page_size, head_dim)
        hot[0] *= 1e-40
        hot[1, 0] = 7.25
        hot[2] = (hot[2] * 1e38).clamp(-3e38, 3e38)
        hot[3, :, :, ::3] += 1000
        hot[4, :, :, :, 5] = -300
        hot = hot.to(dtype)
        page_bytes = fmt.page_bytes(page_size, head_dim, dtype.itemsize)
        want = torch.full((9, 2, page_bytes), 0xAA, dtype=torch.uint8)
        got = want.clone().to(DEVICE)
        hot_ids, sealed_ids = torch.tensor(
            [[4, 1, -1, 0, 2, 3], [8, 3, 7, 0, 1, 5]], dtype=torch.int32
        )
        seal_pages(hot, want, hot_ids, sealed_ids, fmt=fmt)
        ids = hot_ids.to(DEVICE), sealed_ids.to(DEVICE)
        seal_pages(hot.to(DEVICE), got, *ids, fmt=fmt, backend="triton")
        assert torch.equal(got.cpu(), want)


@EVERY_DTYPE
def test_write_matches_the_reference(dtype: torch.dtype) -> None:
    hot = torch.full((5, 2, 3, 16, 80), 9.0, dtype=dtype)
    qkv = torch.randn(4, 9, 80, dtype=dtype)  # keys and values as views of a projection
    k, v = qkv[:, 3:6], qkv[:, 6:]
    slots = torch.tensor([0, 79, -1, 33])
    want, got = hot.clone(), hot.clone().to(DEVICE)
    write_hot(k, v, want, slots)
    write_hot(k.to(DEVICE), v.to(DEVICE), got, slots.to(DEVICE), backend="triton")
    assert torch.equal(got.cpu(), want)


def test_merge_matches_the_reference() -> None:
    outs = torch.randn(5, 4, 3, 80)
    lses = torch.randn(5, 4, 3) * 10
    lses[:, 0, 0] = -torch.inf
    lses[1:, 1] = -torch.inf
    outs[2, 1] = float("nan")
    want_out, want_lse = merge_states(outs, lses)
    out, lse = merge_states(outs.to(DEVICE), lses.to(DEVICE), backend="triton")
    torch.testing.assert_close(out.cpu(), want_out, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse.cpu(), want_lse, atol=2e-6, rtol=0)


def test_kernels_refuse_what_they_cannot_address() -> None:
    fmt = get_format("int8")
    case = make_case(fmt, Shape(page_size=24), [(50, 1)]).to(DEVICE)
    with pytest.raises(ValueError, match="page_size that 16 divides"):
        paged_attention(
            case.q, case.hot, case.sealed, case.batch, fmt=fmt, scale=1.0, backend="triton"
        )
