"""A million tokens, and pages whose bytes lie beyond two gigabytes.

The interpreter takes 5 to 20 ms per tile, however large, so a million tokens are read there in
tiles of 8192 by kernels that are otherwise the same; on a GPU the tiles are not changed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvmesh.kernels.attention import paged_attention, triton_launch
from kvmesh.kernels.attention.triton_form import Geometry
from kvmesh.kernels.attention.triton_launch import takes_integer_path
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.kernels.seal import seal_layers, seal_pages
from kvmesh.kernels.write import write_hot
from tests.kernels.cases import Shape
from tests.kernels.long_cases import LongCase, arena, long_truth, make_long_case, pages_beyond

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
MILLION = 2**20
LARGE = 8192 if DEVICE == "cpu" else 64  # tokens of a page and of a tile where tiles are large
LONG = 131071 if DEVICE == "cuda" else 16383


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of a page in the plain loop, if the interpreter runs it."""
    made = (triton_launch.decode_launch, triton_launch.prefill_launch)
    for cached in made:
        cached.cache_clear()
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_launch, "MAX_BLOCK_N", LARGE)
    yield
    for cached in made:
        cached.cache_clear()


def check(case: LongCase, backend: str, *, integer: bool = False, rounding: float = 2e-6) -> None:
    """FlashAttention's rule, as in test_triton.py. Torch's own error is measured over pages
    weighted by how often they are read, which is smaller than over a million keys.

    Plain torch is not held to the rule: it has the rounding of fp32 sums over a million terms in
    whatever order its libraries choose, so the rule would compare one such order with another.

    rounding: of the operator's own sums in fp32
    """
    scale = case.shape.head_dim**-0.5
    out, lse = paged_attention(
        case.q, case.hot, case.sealed, case.batch, fmt=case.fmt, scale=scale, backend=backend
    )
    want_out, want_lse = long_truth(case, scale)

    def error_of(dtype: torch.dtype) -> float:
        return float((long_truth(case, scale, dtype)[0].double() - want_out).abs().max())

    if backend == "reference":
        limit, lse_limit = 1e-3, 1e-4
    elif case.q.dtype == torch.bfloat16:
        limit, lse_limit = 2 * error_of(torch.bfloat16) + 1e-4, 2e-2
    elif integer:
        limit, lse_limit = 0.25 * error_of(torch.bfloat16), 1e-3
    else:
        limit, lse_limit = 2 * error_of(torch.float32) + rounding, 1e-5
    assert (out.cpu().double() - want_out).abs().max() <= limit
    assert (lse.cpu().double() - want_lse).abs().max() < lse_limit


def far_case(name: str, shape: Shape, sequences: list[tuple[int, int]]) -> LongCase:
    """Pages beyond 2^31 elements of either arena, or beyond 2^31 bytes of the sealed one."""
    fmt = get_format(name)
    page_bytes = fmt.page_bytes(shape.page_size, shape.head_dim, DTYPE.itemsize)
    hot_elements = 2 * shape.num_kv_heads * shape.page_size * shape.head_dim
    return make_long_case(
        fmt,
        shape,
        sequences,
        dtype=DTYPE,
        device=DEVICE,
        first_hot=pages_beyond(2**31, hot_elements),
        first_sealed=pages_beyond(2**31, page_bytes * shape.num_kv_heads),
    )


MIXED = [(1, 1), (MILLION, 1), (64, 1), (1, 0)]  # the last one is padding


@pytest.mark.parametrize("name", [*format_names(comparison=False), "kivi2"])
def test_a_million_tokens_in_plain_torch(name: str) -> None:
    fmt = get_format(name)
    shape = Shape(2, 1, 64, 64, fmt.sink_pages, fmt.recent_pages)
    case = make_long_case(fmt, shape, [*MIXED, (131071, 1)], dtype=torch.float32, device="cpu")
    check(case, "reference")


@pytest.mark.parametrize("name", ["exact", "int8", "k4v4", "k3v2"])
def test_a_million_tokens_in_compiled_loops(name: str) -> None:
    """Held to the rule itself, with pages beyond 2^31 elements of both arenas."""
    pytest.importorskip("numba")
    fmt = get_format(name)
    shape = Shape(2, 1, 64, 64, fmt.sink_pages, fmt.recent_pages)
    case = make_long_case(
        fmt,
        shape,
        [*MIXED, (131071, 1)],
        dtype=torch.float32,
        device="cpu",
        first_hot=pages_beyond(2**31, 2 * 64 * 64),
        first_sealed=pages_beyond(2**31, fmt.page_bytes(64, 64, 4)),
    )
    check(case, "numba")


def test_a_chunk_after_a_million_tokens_in_plain_torch() -> None:
    shape = Shape(2, 1, 64, 64, 1, 2)
    case = far_case("k4v4", shape, [(1, 1), (MILLION - 1, 70), (200, 130)])
    check(case, "reference")


@pytest.mark.parametrize("name", ["exact", "int8"])
def test_many_tiles_of_far_pages(name: str) -> None:
    case = far_case(name, Shape(2, 1, 64, 64), [(LONG, 1), (1, 1), (63, 1), (1, 0)])
    check(case, "triton", integer=name != "exact")


@pytest.mark.parametrize("name", ["k3v2", "k4v4", "fp8"])
def test_far_pages_in_other_formats(name: str) -> None:
    case = far_case(name, Shape(2, 1, 64, 64, 1, 2), [(4000, 1), (64, 1), (130, 3)])
    check(case, "triton", integer=name != "fp8")


@pytest.mark.usefixtures("large_tiles")
def test_a_million_and_one_tokens() -> None:
    case = far_case("exact", Shape(2, 1, 64, LARGE), MIXED)
    check(case, "triton")


@pytest.mark.usefixtures("large_tiles")
def test_a_chunk_after_a_million_tokens() -> None:
    shape = Shape(2, 1, 64, LARGE, 1, 1)
    case = far_case("exact", shape, [(1, 1), (MILLION - 1, 3), (1, 0)])
    # One program reads all tiles, which decode would split.
    check(case, "triton", rounding=2e-5)


@pytest.mark.usefixtures("large_tiles")
def test_last_pages_of_a_long_sequence_take_the_integer_path() -> None:
    """The integer loop's layout fixes its tiles at 64 tokens: it reads the last pages, and the
    plain loop reads the others, as a sink, in the same tiles. So the interpreter reads 16,384
    tokens, of pages beyond 2^31 elements, and a GPU a million."""
    longest = 1 << 14 if DEVICE == "cpu" else MILLION
    size = 1024
    case = far_case(
        "int8", Shape(2, 1, 64, size, longest // size - 3), [(1, 1), (longest, 1), (64, 1), (1, 0)]
    )
    check(case, "triton", integer=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes in the interpreter")
@pytest.mark.parametrize("name", ["int8", "int4", "k8v4", "k4v4", "k4v2", "k3v2", "k2v2"])
def test_a_million_tokens_in_the_integer_loop(name: str) -> None:
    fmt, shape = get_format(name), Shape(8, 1, 128, 64)
    geometry = Geometry(1, 8, 128, 64, DTYPE.itemsize)
    assert takes_integer_path(fmt, geometry, torch.cuda.get_device_capability())
    check(far_case(name, shape, [*MIXED, (131071, 1)]), "triton", integer=True)


# Sealing and writing


BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


@BACKENDS
@pytest.mark.parametrize("name", ["exact", "int8", "k3v2"])
def test_sealing_far_pages_of_far_layers(name: str, backend: str) -> None:
    """The layer begins beyond 2^31 elements, and so does the page within its layer."""
    fmt, size, dim = get_format(name), 64, 64
    page_bytes = fmt.page_bytes(size, dim, DTYPE.itemsize)
    far_hot = pages_beyond(2**31, 2 * size * dim)
    far_sealed = pages_beyond(2**31, page_bytes)
    hot = arena((2, far_hot + 2, 2, 1, size, dim), DTYPE, DEVICE)
    sealed = arena((2, far_sealed + 2, 1, page_bytes), torch.uint8, DEVICE)
    content = torch.randn(2, 2, 2, 1, size, dim, dtype=DTYPE)  # two layers, two pages each
    hot_ids = torch.tensor([far_hot + 1, -1, 1], dtype=torch.int32)
    sealed_ids = torch.tensor([1, 0, far_sealed + 1], dtype=torch.int32)
    for index, page in enumerate((far_hot + 1, 1)):
        hot[:, page] = content[:, index].to(DEVICE)
    untouched = [0, 2, far_sealed]
    sealed[:, untouched] = 0xAA
    ids = hot_ids.to(DEVICE), sealed_ids.to(DEVICE)
    seal_layers(hot, sealed, *ids, fmt=fmt, backend=backend)
    for layer in range(2):
        k, v = content[layer].unbind(1)
        want = fmt.encode(k, v)
        assert torch.equal(sealed[layer, [1, far_sealed + 1]].cpu(), want)
    assert (sealed[:, untouched] == 0xAA).all()
    sealed[1, [1, far_sealed + 1]] = 0xAA
    seal_pages(hot[1], sealed[1], *ids, fmt=fmt, backend=backend)
    assert torch.equal(sealed[1, [1, far_sealed + 1]].cpu(), want)


@BACKENDS
@pytest.mark.parametrize("tokens", [1, 3])
def test_writing_far_pages(tokens: int, backend: str) -> None:
    heads, size, dim = 2, 64, 64
    far = pages_beyond(2**31, 2 * heads * size * dim)
    hot = arena((far + 2, 2, heads, size, dim), DTYPE, DEVICE)
    hot[[0, far, far + 1]] = 9.0
    k, v = torch.randn(2, tokens, heads, dim, dtype=DTYPE)
    slots = torch.tensor([(far + 1) * size + 5, -1, 63])[:tokens]
    write_hot(k.to(DEVICE), v.to(DEVICE), hot, slots.to(DEVICE), backend=backend)
    want = torch.full((3, 2, heads, size, dim), 9.0, dtype=DTYPE)
    want[2, :, :, 5] = torch.stack((k[0], v[0]))
    if tokens == 3:
        want[0, :, :, 63] = torch.stack((k[2], v[2]))
    assert torch.equal(hot[[0, far, far + 1]].cpu(), want)
