"""Sequences of a million tokens made of a few distinct pages, and arenas of gigabytes.

A block table may name a page any number of times, so a million tokens need only a few pages
of data. The expected result does not need a million keys either: a page that is read n times
acts like a page whose scores are larger by log n.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch

from kvmesh.kernels.attention import AttentionBatch
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.seal import seal_pages
from tests.kernels.cases import Shape

# Content pages of a case: ordinary ones, and three "needles" that occur once each, whose keys
# have as much weight as all others together.
ORDINARY = 8
NEEDLES = 3
# Linux: pages of the mapping use memory only once they are touched.
MAP_NORESERVE = 0x4000


def arena(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A tensor that uses memory only where it is written; on a GPU all of it is allocated."""
    if device != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=dtype).view(shape)


def pages_beyond(limit: int, page_elements: int) -> int:
    """The first page whose elements all lie at indices beyond `limit`."""
    return limit // page_elements + 1


@dataclass(frozen=True)
class LongCase:
    """A batch over repeated pages.

    k, v: [content pages, tokens, num_kv_heads, head_dim], exact and as sealed
    contents: for each sequence, the content page of each logical page
    """

    shape: Shape
    fmt: KVFormat
    q: torch.Tensor
    hot: torch.Tensor
    sealed: torch.Tensor
    batch: AttentionBatch
    exact: torch.Tensor
    decoded: torch.Tensor
    contents: list[torch.Tensor]
    sequences: list[tuple[int, int]]


def make_long_case(
    fmt: KVFormat,
    shape: Shape,
    sequences: list[tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: str,
    first_hot: int = 0,
    first_sealed: int = 0,
) -> LongCase:
    """sequences: (total tokens, new tokens; 0 for a padding sequence)

    The last page of each is a separate hot page, NaN after its end. first_hot,
    first_sealed: page ids below these are never used.
    """
    size, heads, dim = shape.page_size, shape.num_kv_heads, shape.head_dim
    count = ORDINARY + NEEDLES + len(sequences)
    exact = torch.randn(2, count, heads, size, dim)
    query = torch.randn(heads, dim)
    # A needle's values differ from all others, and its keys align with all queries.
    for needle in range(NEEDLES):
        exact[0, ORDINARY + needle] += 0.6 * query[:, None]
        exact[1, ORDINARY + needle] += 3.0 * (needle - 1)
    exact = exact.to(dtype)
    hot = arena((first_hot + count, 2, heads, size, dim), dtype, device)
    page_bytes = fmt.page_bytes(size, dim, dtype.itemsize)
    sealed = arena((first_sealed + count, heads, page_bytes), torch.uint8, device)
    ids = torch.arange(count, dtype=torch.int32)
    pages = torch.empty((count, heads, page_bytes), dtype=torch.uint8)
    seal_pages(exact.transpose(0, 1).contiguous(), pages, ids, ids, fmt=fmt)
    stored = dtype if fmt.name == "exact" else torch.float32
    decoded = torch.stack(fmt.decode(pages, size, dim, stored))
    sealed[first_sealed:] = pages.to(device)
    hot[first_hot:] = exact.transpose(0, 1).to(device)

    max_pages = max(-(-length // size) for length, _ in sequences)
    hot_tables = torch.full((len(sequences), max_pages), -1, dtype=torch.int32)
    sealed_tables = hot_tables.clone()
    contents = []
    for seq, (length, new) in enumerate(sequences):
        last_page = (length - 1) // size
        content = torch.randint(0, ORDINARY, (last_page + 1,))
        content[last_page] = ORDINARY + NEEDLES + seq
        for needle, at in enumerate((shape.sink_pages, last_page // 2, last_page - 1)):
            if 0 <= at < last_page:
                content[at] = ORDINARY + needle
        contents.append(content)
        first_page = (length - max(new, 1)) // size
        logical = torch.arange(last_page + 1)
        is_hot = (logical < shape.sink_pages) | (logical >= first_page - shape.recent_pages)
        is_sealed = (logical >= shape.sink_pages) & (logical < last_page - shape.recent_pages)
        hot_tables[seq, : last_page + 1][is_hot] = first_hot + content[is_hot].int()
        sealed_tables[seq, : last_page + 1][is_sealed] = first_sealed + content[is_sealed].int()
        behind = length - last_page * size
        hot[first_hot + ORDINARY + NEEDLES + seq, :, :, behind:] = float("nan")

    new_tokens = [new for _, new in sequences]
    starts = torch.tensor([0, *new_tokens]).cumsum(0).to(torch.int32)
    group = shape.num_heads // heads
    noise = torch.randn(int(starts[-1]), shape.num_heads, dim)
    q = query.repeat_interleave(group, 0)[None] + 0.3 * noise
    batch = AttentionBatch(
        query_starts=starts.to(device),
        seq_lens=torch.tensor([length for length, _ in sequences], dtype=torch.int32).to(device),
        rows=torch.arange(len(sequences), dtype=torch.int32).to(device),
        hot_tables=hot_tables.to(device),
        sealed_tables=sealed_tables.to(device),
        page_size=size,
        sink_pages=shape.sink_pages,
        recent_pages=shape.recent_pages,
        max_query_len=max(new_tokens),
        max_seq_len=max(length for length, _ in sequences),
    )
    q = q.to(dtype).to(device)
    return LongCase(shape, fmt, q, hot, sealed, batch, exact, decoded, contents, sequences)


def long_truth(
    case: LongCase, scale: float, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, lse of every new token, computed in `dtype`."""
    outs, lses = [], []
    row = 0
    for (length, new), content in zip(case.sequences, case.contents, strict=True):
        for position in range(length - new, length):
            k, v, times = _visible(case, content, position, dtype)
            q = case.q[row].cpu().to(dtype).unflatten(0, (k.shape[0], -1))
            score = q @ k.mT * scale + times.log().to(dtype)
            outs.append((torch.softmax(score, -1) @ v).flatten(0, 1))
            lses.append(torch.logsumexp(score, -1).flatten())
            row += 1
    return torch.stack(outs), torch.stack(lses)


def _visible(
    case: LongCase, content: torch.Tensor, position: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct keys and values that the query at `position` sees, [num_kv_heads, keys,
    head_dim], and how often it sees each, [keys]."""
    size = case.shape.page_size
    page = position // size
    logical = torch.arange(page)
    is_hot = (logical < case.shape.sink_pages) | (logical >= page - case.shape.recent_pages)
    parts, times = [], []
    for form, seen in ((case.exact, is_hot), (case.decoded, ~is_hot)):
        counts = torch.bincount(content[:page][seen])
        indices = counts.nonzero().flatten()
        parts.append(form[:, indices].transpose(1, 2).flatten(2, 3).to(dtype))
        times.append(counts[indices].repeat_interleave(size))
    last = position % size + 1
    parts.append(case.exact[:, int(content[page]), :, :last].to(dtype))
    times.append(torch.ones(last, dtype=torch.int64))
    k, v = torch.cat(parts, 2)
    return k, v, torch.cat(times).double()
