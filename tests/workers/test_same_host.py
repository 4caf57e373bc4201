"""Sums, gathers and exchanges through shared memory, between ranks that are threads here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvmesh.workers.parallel import same_host
from kvmesh.workers.parallel.same_host import SameHost, make_meeting_place

BYTES = 256
SIZE = 4
# Elements of fp32: fewer than the buffer has, exactly as many, and so many that parts are sent in
# several rounds, the last of which is shorter.
COUNTS = (1, BYTES // 4, BYTES // 4 + 1, 333)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SameHost]]:
    monkeypatch.setattr(same_host, "_BUFFER_BYTES", BYTES)
    place = make_meeting_place(SIZE)
    made = [SameHost(rank, SIZE, place, timeout_s=60.0) for rank in range(SIZE)]
    for rank in made:
        rank.listen()
    with ThreadPoolExecutor(SIZE) as threads:
        list(threads.map(SameHost.meet, made))
    shutil.rmtree(place)
    yield made
    for rank in made:
        rank.close()


def on_all(
    ranks: list[SameHost],
    call: Callable[[SameHost, torch.Tensor], torch.Tensor],
    parts: torch.Tensor,
) -> torch.Tensor:
    """[SIZE, ...], what each rank has after it was called with its part."""
    with ThreadPoolExecutor(SIZE) as threads:
        return torch.stack(list(threads.map(call, ranks, parts.clone())))


def parts_of(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, *shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", COUNTS)
def test_parts_of_any_length_are_summed_gathered_and_exchanged(
    ranks: list[SameHost], count: int, dtype: torch.dtype
) -> None:
    def reduce(rank: SameHost, part: torch.Tensor) -> torch.Tensor:
        rank.all_reduce(part)
        return part

    parts = parts_of(3, count, dtype=dtype)
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part
    assert torch.equal(on_all(ranks, reduce, parts), total.to(dtype).expand_as(parts))
    gathered = on_all(ranks, SameHost.all_gather, parts)
    assert torch.equal(gathered, parts.expand(SIZE, *parts.shape))
    for kvp in (1, 2, 4):

        def exchange(rank: SameHost, own: torch.Tensor, kvp: int = kvp) -> torch.Tensor:
            first = rank._rank // kvp * kvp
            return rank.exchange(own, range(first, first + kvp))

        parts = parts_of(kvp, count, 2, dtype=dtype)
        by_range = parts.view(SIZE // kvp, kvp, kvp, count, 2)
        want = by_range.transpose(1, 2).reshape_as(parts)
        assert torch.equal(on_all(ranks, exchange, parts), want)
