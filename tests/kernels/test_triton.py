"""The Triton kernels: in the interpreter and fp32 without a GPU, compiled and bf16 with one.

The interpreter is slow, so each case mixes several odd lengths. One format of each
kind of side is tested on every shape, the others on one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import pytest
import torch

from benchmarks.stand_in_params import model_params_for, params_for
from kvmesh.kernels import workspace
from kvmesh.kernels.attention import paged_attention, triton_attention
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_launch import takes_integer_path
from kvmesh.kernels.direct import BoundKernels
from kvmesh.kernels.formats.affine.side import Affine
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.kernels.merge import merge_states
from kvmesh.kernels.seal import seal_layers, seal_pages, triton_seal
from kvmesh.kernels.write import write_hot
from tests.kernels.cases import (
    AttentionOptions,
    Case,
    Shape,
    make_case,
    truth,
    with_empty_sequences,
)

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else None

SERVED = format_names(comparison=False)
# Dense tiles, grids per token, grids per channel and levels, e4m3.
EVERY_KIND = ["exact", "int8", "k3v2", "fp8"]
INTEGER = ["int8", "k8v4", "k4v4", "k4v2", "k3v2", "k2v2", "int4"]

# A combination that the kernels support but the registry does not contain.
CHANNELS_BF16 = KVFormat(
    "channels-bf16",
    Affine(8, along="channel"),
    Affine(3, values=True),
    "scales per channel in bf16",
)
INTEGER_KINDS = [*INTEGER, CHANNELS_BF16.name]

KINDS = pytest.mark.parametrize("name", EVERY_KIND)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def format_of(name: str) -> KVFormat:
    return CHANNELS_BF16 if name == CHANNELS_BF16.name else get_format(name)


def attend(case: Case, **options: Unpack[AttentionOptions]) -> tuple[torch.Tensor, torch.Tensor]:
    on_device = case.to(DEVICE)
    out, lse = paged_attention(
        on_device.q,
        on_device.hot,
        on_device.sealed,
        on_device.batch,
        fmt=case.fmt,
        scale=case.shape.head_dim**-0.5,
        params=on_device.params,
        backend="triton",
        **options,
    )
    return out.cpu(), lse.cpu()


def check(case: Case, *, integer: bool = False, **options: Unpack[AttentionOptions]) -> None:
    """FlashAttention's rule: at most twice the error of torch in the same dtype.

    integer: the case takes the integer path, whose queries and weights have 15 bits: in fp32
        its error is at most a quarter of torch's error in bf16
    """
    shape, dtype = case.shape, case.q.dtype
    assert integer == takes_integer_path(
        case.fmt, Geometry.of(case.hot, shape.num_heads), CAPABILITY, options.get("sliding_window")
    ) or (dtype == torch.float32 and CAPABILITY is not None)
    scale = shape.head_dim**-0.5
    out, lse = attend(case, **options)
    want_out, want_lse = truth(case, scale=scale, **options)

    def error_of(dtype: torch.dtype) -> torch.Tensor:
        return (truth(case, scale=scale, **options, dtype=dtype)[0].double() - want_out).abs().max()

    if dtype == torch.bfloat16:
        limit, lse_limit = 2 * error_of(dtype) + 1e-4, 2e-2
    elif integer:
        limit, lse_limit = 0.25 * error_of(torch.bfloat16), 1e-3
    else:
        limit, lse_limit = 2 * error_of(dtype) + 2e-6, 1e-5
    count = want_out.shape[0]
    assert (out[:count].double() - want_out).abs().max() <= limit
    assert (lse[:count].double() - want_lse).abs().max() < lse_limit
    assert (out[count:] == 0).all()
    assert (lse[count:] == -torch.inf).all()


PLAIN_SHAPES = [
    (2, 2, 64, 16, (0, 0)),  # groups of 1
    (6, 2, 80, 32, (1, 1)),  # groups of 3, a head_dim that is not a power of two
    (3, 1, 64, 48, (2, 2)),  # a page_size that is not a power of two
    (4, 1, 96, 64, (0, 0)),  # groups of 4
]


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in EVERY_KIND for shape in PLAIN_SHAPES),
        *((name, PLAIN_SHAPES[0]) for name in SERVED if name not in EVERY_KIND),
        ("channels-bf16", PLAIN_SHAPES[1]),
    ],
)
def test_mixed_batch_matches_the_expected_results(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int, int, tuple[int, int]]
) -> None:
    heads, kv_heads, head_dim, page_size, windows = shape
    lengths = [(1, 1), (page_size, 1), (2 * page_size + 7, page_size + 9)]
    if page_size == 16:
        lengths += [(63, 1), (65, 1), (64, 23)]
    lengths.append((min(5, 160 // page_size) * page_size + 3, 1))
    geometry = Shape(heads, kv_heads, head_dim, page_size, *windows)
    case = make_case(format_of(name), geometry, lengths, dtype=dtype, padding_tokens=2)
    check(case)


@KINDS
@EVERY_DTYPE
def test_softcap_and_sliding_window(name: str, dtype: torch.dtype) -> None:
    shape = Shape(3, 1, 64, 16, sink_pages=1, recent_pages=1)
    case = make_case(get_format(name), shape, [(1, 1), (130, 1), (90, 30)], dtype=dtype)
    check(case, softcap=15.0, sliding_window=37)
    check(case, softcap=15.0)
    check(case, sliding_window=1)
    check(case, sliding_window=-40)


@EVERY_DTYPE
def test_sequences_without_a_query_are_padding(dtype: torch.dtype) -> None:
    lengths = [(40, 1), (17, 1)]
    case = make_case(get_format("int8"), Shape(3, 1), lengths, dtype=dtype, padding_tokens=2)
    check(with_empty_sequences(case, 2))


@KINDS
@EVERY_DTYPE
def test_long_decode_is_split_and_pages_are_shared(name: str, dtype: torch.dtype) -> None:
    shape = Shape(3, 1, 64, 16)
    case = make_case(
        get_format(name), shape, [(1000, 1), (400, 1)], dtype=dtype, shared_prefix_pages=20
    )
    check(case)


# Codes on integer tensor cores


def test_which_formats_take_the_integer_path() -> None:
    def takes(
        name: str,
        *,
        head_dim: int = 128,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        capability: tuple[int, int] | None = None,
        sliding_window: int | None = None,
    ) -> bool:
        geometry = Geometry(1, 8, head_dim, page_size, dtype.itemsize)
        return takes_integer_path(format_of(name), geometry, capability, sliding_window)

    assert all(takes(name) for name in INTEGER_KINDS)
    assert not takes("exact")
    assert not takes("fp8")
    assert takes("int8", head_dim=64, page_size=128, capability=(8, 0))
    assert takes("int8", dtype=torch.float16, capability=(9, 0))
    assert not takes("int8", head_dim=80)
    assert not takes("int8", head_dim=256)
    assert not takes("int8", page_size=32)
    assert not takes("int8", page_size=96)
    assert not takes("int8", sliding_window=100)
    assert not takes("int8", capability=(7, 5))
    assert not takes("int8", dtype=torch.float32, capability=(9, 0))


@EVERY_DTYPE
@pytest.mark.parametrize("name", INTEGER_KINDS)
def test_integer_path_matches_the_expected_results(name: str, dtype: torch.dtype) -> None:
    lengths = [(300, 1), (1, 1), (64, 1), (65, 1), (130, 9)]
    case = make_case(format_of(name), Shape(8, 1, 128, 64), lengths, dtype=dtype, padding_tokens=1)
    check(case, integer=True)


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["int8", "k3v2"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "windows"),
    [
        (6, 2, 64, 64, (1, 1)),  # groups of 3
        (24, 2, 64, 128, (0, 0)),  # groups of 12: two programs; pages of two blocks
    ],
)
def test_integer_path_with_other_shapes(
    name: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    windows: tuple[int, int],
) -> None:
    shape = Shape(heads, kv_heads, head_dim, page_size, *windows)
    case = make_case(format_of(name), shape, [(63, 1), (500, 1)], dtype=dtype)
    check(case, integer=True)
    check(case, integer=True, softcap=15.0)


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["int4", "k2v2"])
def test_integer_path_splits_long_sequences_and_shares_pages(name: str, dtype: torch.dtype) -> None:
    case = make_case(
        get_format(name),
        Shape(2, 1, 64, 64),
        [(1000, 1), (400, 1)],
        dtype=dtype,
        shared_prefix_pages=5,
    )
    check(with_empty_sequences(case, 1), integer=True)


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["int8", "k4v2"])
def test_integer_and_plain_path_agree(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(get_format(name), Shape(5, 1, 64, 64, 1, 1), [(400, 1)], dtype=dtype)
    out, lse = attend(case)
    monkeypatch.setattr(triton_attention, "takes_integer_path", lambda *_, **__: False)
    plain_out, plain_lse = attend(case)
    torch.testing.assert_close(
        out, plain_out, atol=2e-4 if dtype == torch.float32 else 1e-2, rtol=0
    )
    torch.testing.assert_close(lse, plain_lse, atol=1e-3, rtol=0)
    assert not torch.equal(out, plain_out)  # two different paths ran


@pytest.mark.parametrize("name", ["int8", "int4", "k4v4", "k4v2"])
def test_integer_path_handles_pages_and_queries_of_zeros(name: str) -> None:
    """Pages of zeros have the minimum scale; a query of zeros has the maximum 0."""
    fmt, shape = get_format(name), Shape(2, 1, 64, 64)
    case = make_case(fmt, shape, [(200, 1)])
    case.q[:, 1] = 0.0
    row = int(case.batch.rows[0])
    pages = case.batch.sealed_tables[row, :3].long()
    nothing = torch.zeros(1, 1, 64, 64)
    case.sealed[pages[0]] = fmt.encode(nothing, nothing)
    case.k[0][:64] = case.v[0][:64] = 0.0
    check(case, integer=True)
    case.sealed[pages] = fmt.encode(nothing, nothing)
    case.k[0][:192] = case.v[0][:192] = 0.0
    out, _ = attend(case)
    assert out.isfinite().all()


def test_pages_beyond_two_gigabytes() -> None:
    """Page offsets are 64 bits wide. Most of the arena's memory is never touched."""
    fmt, shape = get_format("int8"), Shape(2, 1, 128, 64)
    case = make_case(fmt, shape, [(140, 1), (70, 10)])
    page_bytes = case.sealed.shape[-1]
    far = 2**31 // page_bytes + 1
    sealed = torch.empty(far + len(case.sealed), 1, page_bytes, dtype=torch.uint8)
    sealed[far:] = case.sealed
    tables = case.batch.sealed_tables
    moved = torch.where(tables >= 0, tables + far, tables)
    case = replace(case, sealed=sealed, batch=replace(case.batch, sealed_tables=moved))
    check(case, integer=True)
    want = sealed[far].clone()
    hot = torch.randn(1, 2, 1, 64, 128)
    ids = torch.tensor([[0], [far]], dtype=torch.int32)
    on_device = sealed.to(DEVICE)
    seal_pages(hot.to(DEVICE), on_device, *ids.to(DEVICE), fmt=fmt, backend="triton")
    assert not torch.equal(on_device[far].cpu(), want)
    assert torch.equal(on_device[far].cpu(), fmt.encode(hot[:, 0], hot[:, 1])[0])


# Sealing


def hard_pages(page_size: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[6, 2, 2, page_size, head_dim] with tiny, constant, huge, shifted and skewed numbers."""
    hot = torch.randn(6, 2, 2, page_size, head_dim)
    hot[0] *= 1e-40
    hot[1, 0] = 7.25
    hot[2] = (hot[2] * 1e38).clamp(-3e38, 3e38)
    hot[3, :, :, ::3] += 1000
    hot[4, :, :, :, 5] = -300
    return hot.to(dtype)


def sealed_both_ways(fmt: KVFormat, hot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By plain torch and by the kernel: hot pages 4, 1, 0, 2, 3 into sealed 8, 3, 0, 1, 5."""
    page_bytes = fmt.page_bytes(hot.shape[3], hot.shape[4], hot.element_size())
    want = torch.full((9, 2, page_bytes), 0xAA, dtype=torch.uint8)
    got = want.clone().to(DEVICE)
    ids = torch.tensor([[4, 1, -1, 0, 2, 3], [8, 3, 7, 0, 1, 5]], dtype=torch.int32)
    params = params_for(fmt, 2, hot.shape[4])
    positions = POSITIONS // hot.shape[3] * hot.shape[3]
    seal_pages(hot, want, *ids, fmt=fmt, params=params, positions=positions)
    seal_pages(
        hot.to(DEVICE),
        got,
        *ids.to(DEVICE),
        fmt=fmt,
        params=params.to(DEVICE),
        positions=positions.to(DEVICE),
        backend="triton",
    )
    return want, got.cpu()


POSITIONS = torch.tensor([0, 100, 0, 70_000, 1_000_000, (1 << 31) - 1])
SAME_BYTES = ["exact", "int8", "int4"]


@EVERY_DTYPE
@pytest.mark.parametrize("name", [*SAME_BYTES, "channels-bf16"])
def test_sealing_gives_the_reference_bytes(name: str, dtype: torch.dtype) -> None:
    for head_dim, page_size in ((64, 16), (80, 48)):
        want, got = sealed_both_ways(format_of(name), hard_pages(page_size, head_dim, dtype))
        assert torch.equal(got, want)


@EVERY_DTYPE
@pytest.mark.parametrize("name", [name for name in SERVED if name not in SAME_BYTES])
def test_sealing_that_sums_in_another_order_is_as_accurate(name: str, dtype: torch.dtype) -> None:
    """Nearly all bytes are equal, and the errors agree to 1%."""
    fmt = format_of(name)
    shapes = ((64, 16), (80, 48), (32, 128)) if name in EVERY_KIND else ((80, 48),)
    for head_dim, page_size in shapes:
        hot = hard_pages(page_size, head_dim, dtype)
        want, got = sealed_both_ways(fmt, hot)
        assert (got != want).float().mean() < 5e-3
        assert torch.equal(got[[2, 4, 6, 7]], want[[2, 4, 6, 7]])  # not written
        params = params_for(fmt, 2, head_dim)
        shape = (page_size, head_dim, torch.float32, params)
        sources, targets = [4, 1, 3], [8, 3, 5]
        decoded = [fmt.decode(pages[targets], *shape) for pages in (want, got)]
        for i, source in enumerate(sources):
            for part in range(2):
                x = hot[source, part].double()
                errors = [(both[part][i].double() - x).square().mean() for both in decoded]
                assert errors[1] <= 1.01 * errors[0] + 1e-12
        hardest = fmt.decode(got[[0, 1]], *shape)
        assert all(x.isfinite().all() for x in hardest)


@EVERY_DTYPE
@pytest.mark.parametrize("name", [*SAME_BYTES, "k3v2", "fp8"])
def test_layers_are_sealed_in_one_launch(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = get_format(name)
    hot = torch.randn(3, 4, 2, 2, 16, 64).to(dtype).to(DEVICE)
    page_bytes = fmt.page_bytes(16, 64, dtype.itemsize)
    together = torch.full((3, 7, 2, page_bytes), 0xAA, dtype=torch.uint8, device=DEVICE)
    alone, want = together.clone(), together.cpu()
    ids = torch.tensor([[3, -1, 0], [6, 2, 1]], dtype=torch.int32, device=DEVICE)
    params, at = model_params_for(fmt, 3, 2, 64), torch.tensor([160, 0, 32])
    on_device = None if params is None else params.to(DEVICE)
    for layer in range(3):
        found = NO_PARAMS if on_device is None else on_device.layers[layer]
        positions = at.to(DEVICE)
        seal_pages(
            hot[layer],
            alone[layer],
            *ids,
            fmt=fmt,
            params=found,
            positions=positions,
            backend="triton",
        )
    launches = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(grid)
            return kernel[grid]

    kernel = triton_seal.seal_kernel
    monkeypatch.setattr(triton_seal, "_seals", BoundKernels(Counted(), num_warps=8))
    seal_layers(
        hot, together, *ids, fmt=fmt, params=on_device, positions=at.to(DEVICE), backend="triton"
    )
    assert launches == [(3, 2, 6)]
    assert torch.equal(together, alone)
    assert (together[:, [0, 2, 3, 4, 5]] == 0xAA).all()  # padding is skipped
    if name in SAME_BYTES:
        seal_layers(hot.cpu(), want, *ids.cpu(), fmt=fmt, params=params, positions=at)
        assert torch.equal(together.cpu(), want)


# Writing, merging, refusing


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


def test_merge_of_many_parts() -> None:
    outs, lses = torch.randn(37, 2, 1, 64), torch.randn(37, 2, 1)
    lses[:20, 1] = -torch.inf
    want_out, want_lse = merge_states(outs, lses)
    out, lse = merge_states(outs.to(DEVICE), lses.to(DEVICE), backend="triton")
    torch.testing.assert_close(out.cpu(), want_out, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse.cpu(), want_lse, atol=2e-6, rtol=0)


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["turboquant-qjl", "kivi2", "nuq3"])
def test_formats_for_comparison_are_decoded_first(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, and sequence by sequence and page by page."""
    lengths = [(1, 1), (130, 1), (70, 33), (90, 1)]
    shape = Shape(4, 2, 64, 16, 1, 1)
    case = make_case(get_format(name), shape, lengths, dtype=dtype, padding_tokens=1)
    case = with_empty_sequences(case, 1)
    check(case, sliding_window=40)
    check(case, softcap=15.0)
    out, lse = attend(case)
    monkeypatch.setattr(workspace, "DECODED_TOKENS", 16)
    monkeypatch.setattr(workspace, "DECODED_AT_ONCE", 16)
    case.batch.plans.clear()
    pieces, piece_lse = attend(case)
    assert torch.equal(pieces, out) and torch.equal(piece_lse, lse)


def test_missing_parameters_are_named() -> None:
    case = make_case(get_format("nuq3"), Shape(), [(20, 1)]).to(DEVICE)
    with pytest.raises(
        ValueError, match="nuq3 needs calibrated parameters; missing: levels, bounds, inv_freq"
    ):
        paged_attention(
            case.q, case.hot, case.sealed, case.batch, fmt=case.fmt, scale=1.0, backend="triton"
        )


def test_kernels_refuse_what_they_cannot_address() -> None:
    fmt = get_format("int8")
    case = make_case(fmt, Shape(page_size=24), [(50, 1)]).to(DEVICE)
    with pytest.raises(ValueError, match="page_size must be a multiple of 16"):
        paged_attention(
            case.q, case.hot, case.sealed, case.batch, fmt=fmt, scale=1.0, backend="triton"
        )
