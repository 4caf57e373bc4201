"""Pools, tables and queries to test attention with, and the expected results.

Expected results are computed per query in fp64 from keys and values laid out in order.
This shares no code with the operators except the formats' own `decode`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

import torch

from benchmarks.stand_in_params import params_for
from kvmesh.kernels.attention import AttentionBatch, SharedPrefixes
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams
from kvmesh.kernels.seal import seal_pages
from kvmesh.kernels.write import write_hot


@dataclass(frozen=True)
class Shape:
    """One model layer's geometry, and the windows of exact pages."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    sink_pages: int = 0
    recent_pages: int = 0


@dataclass(frozen=True)
class Case:
    """A batch with its pools; k and v are each sequence's, [tokens, num_kv_heads, head_dim].

    first_position: the sequences' first position in a text, for pages that store positions
    """

    shape: Shape
    fmt: KVFormat
    q: torch.Tensor
    hot: torch.Tensor
    sealed: torch.Tensor
    batch: AttentionBatch
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    new_tokens: list[int]
    params: LayerParams = NO_PARAMS
    first_position: int = 0

    def to(self, device: str) -> Case:
        b = self.batch
        batch = replace(
            b,
            query_starts=b.query_starts.to(device),
            seq_lens=b.seq_lens.to(device),
            rows=b.rows.to(device),
            hot_tables=b.hot_tables.to(device),
            sealed_tables=b.sealed_tables.to(device),
            prefixes=None if b.prefixes is None else b.prefixes.to(device),
        )
        return replace(
            self,
            q=self.q.to(device),
            hot=self.hot.to(device),
            sealed=self.sealed.to(device),
            batch=batch,
            params=self.params.to(device),
        )


def make_case(
    fmt: KVFormat,
    shape: Shape,
    sequences: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shared_prefix_pages: int = 0,
    padding_tokens: int = 0,
    params: LayerParams | None = None,
    first_position: int = 0,
) -> Case:
    """fmt: if its values are in keys, so are those of the case. sequences: (total tokens, new
    tokens). The pools are shuffled; every page and slot that no
    query may read is NaN (hot) or 0xFF (sealed: NaN scales), and table rows are permuted.

    shared_prefix_pages: how many first sealed pages all sequences share
    params: calibrated parameters; by default some that fit the data
    """
    gen = torch.Generator().manual_seed(seed)
    size, heads, dim = shape.page_size, shape.num_kv_heads, shape.head_dim
    if params is None:
        params = params_for(fmt, heads, dim)
    prefix = torch.randn(2, shared_prefix_pages * size, heads, dim, generator=gen)
    keys, values = [], []
    for length, _ in sequences:
        both = torch.randn(2, length, heads, dim, generator=gen)
        both[0] += torch.randn(heads, dim, generator=gen) * 2  # keys have outlier channels
        common = min(length, prefix.shape[1])
        both[:, :common] = prefix[:, :common]
        keys.append(both[0].to(dtype))
        in_keys = fmt.values_in_keys
        values.append(both[0, ..., :in_keys].to(dtype) if in_keys else both[1].to(dtype))

    max_pages = max(-(-length // size) for length, _ in sequences)
    num_rows = len(sequences) + 2
    rows = torch.randperm(num_rows, generator=gen)[: len(sequences)].to(torch.int32)
    hot_tables = torch.full((num_rows, max_pages), -1, dtype=torch.int32)
    sealed_tables = torch.full((num_rows, max_pages), -1, dtype=torch.int32)
    total = sum(-(-length // size) for length, _ in sequences) + 3
    hot_free = torch.randperm(total, generator=gen).tolist()
    sealed_free = torch.randperm(total, generator=gen).tolist()
    hot = torch.full((total, fmt.stored_sides, heads, size, dim), float("nan"), dtype=dtype)
    staging = torch.full_like(hot, float("nan"))
    sealed = torch.full(
        (total, heads, fmt.page_bytes(size, dim, dtype.itemsize)), 0xFF, dtype=torch.uint8
    )
    shared: dict[int, int] = {}
    for row, (length, new), k, v in zip(rows.tolist(), sequences, keys, values, strict=True):
        first_page, last_page = (length - new) // size, (length - 1) // size
        for page in range(last_page + 1):
            tokens = slice(page * size, min(length, (page + 1) * size))
            count = tokens.stop - tokens.start
            if page < shape.sink_pages or page >= first_page - shape.recent_pages:
                page_id = hot_free.pop()
                hot_tables[row, page] = page_id
                slots = page_id * size + torch.arange(count)
                write_hot(k[tokens], v[tokens], hot, slots)
            if shape.sink_pages <= page < last_page - shape.recent_pages:
                if page < shared_prefix_pages and page in shared:
                    sealed_tables[row, page] = shared[page]
                    continue
                page_id = sealed_free.pop()
                shared[page] = page_id
                sealed_tables[row, page] = page_id
                write_hot(k[tokens], v[tokens], staging, page_id * size + torch.arange(count))
                ids = torch.tensor([page_id], dtype=torch.int32)
                at = torch.tensor([first_position + page * size])
                seal_pages(staging, sealed, ids, ids, fmt=fmt, params=params, positions=at)

    new_tokens = [new for _, new in sequences]
    starts = torch.tensor([0, *new_tokens]).cumsum(0).to(torch.int32)
    q = torch.randn(
        int(starts[-1]) + padding_tokens, shape.num_heads, shape.head_dim, generator=gen
    )
    batch = AttentionBatch(
        query_starts=starts,
        seq_lens=torch.tensor([length for length, _ in sequences], dtype=torch.int32),
        rows=rows,
        hot_tables=hot_tables,
        sealed_tables=sealed_tables,
        page_size=size,
        sink_pages=shape.sink_pages,
        recent_pages=shape.recent_pages,
        max_query_len=max(new_tokens),
        max_seq_len=max(length for length, _ in sequences),
    )
    arenas = (q.to(dtype), hot, sealed)
    return Case(shape, fmt, *arenas, batch, keys, values, new_tokens, params, first_position)


def with_empty_sequences(case: Case, count: int) -> Case:
    """The case with `count` more sequences without new tokens, as padding has them."""
    b = case.batch
    batch = replace(
        b,
        query_starts=torch.cat((b.query_starts, b.query_starts[-1:].repeat(count))),
        seq_lens=torch.cat((b.seq_lens, torch.ones(count, dtype=torch.int32))),
        rows=torch.cat((b.rows, torch.zeros(count, dtype=torch.int32))),
    )
    return replace(case, batch=batch)


def with_prefixes(case: Case, sets: list[tuple[list[int], int]], *, padding: int = 0) -> Case:
    """The case with sets of (sequences, pages that they read together), followed by empty sets."""
    pages = torch.zeros(case.batch.num_seqs, dtype=torch.int32)
    members = torch.full_like(pages, -1)
    starts = [0]
    for seqs, count in sets:
        pages[seqs] = count
        members[starts[-1] : starts[-1] + len(seqs)] = torch.tensor(seqs, dtype=torch.int32)
        starts.append(starts[-1] + len(seqs))
    ends = torch.tensor(starts + [starts[-1]] * padding, dtype=torch.int32)
    return replace(case, batch=replace(case.batch, prefixes=SharedPrefixes(pages, members, ends)))


class AttentionOptions(TypedDict, total=False):
    """What attention computes besides the rule: `paged_attention` and `truth` both take these."""

    softcap: float | None
    sliding_window: int | None


def truth(
    case: Case,
    *,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, lse of every token that is not padding, in `dtype`, from keys and values in order."""
    outs, lses = [], []
    offset = 0
    for k, v, new in zip(case.k, case.v, case.new_tokens, strict=True):
        q = case.q[offset : offset + new].to(dtype)
        offset += new
        out, lse = _sequence_truth(case, q, k, v, scale, softcap, sliding_window)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _sequence_truth(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, size = case.shape, case.shape.page_size
    length, group = k.shape[0], shape.num_heads // shape.num_kv_heads
    k_sealed, v_sealed = _sealed_form(case, k, v)
    i = torch.arange(length - q.shape[0], length)[:, None]
    j = torch.arange(length)[None, :]
    is_hot = (j // size < shape.sink_pages) | (j // size >= i // size - shape.recent_pages)
    visible = j <= i
    if sliding_window is not None:
        if sliding_window > 0:
            visible = visible & (i - j < sliding_window)
        else:
            visible = visible & (i // -sliding_window == j // -sliding_window)
    forms = [x.to(q.dtype).repeat_interleave(group, 1) for x in (k, v, k_sealed, v_sealed)]
    score = torch.where(
        is_hot[None],
        torch.einsum("ihd,jhd->hij", q, forms[0]),
        torch.einsum("ihd,jhd->hij", q, forms[2]),
    )
    score = score * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(score, -1)
    weight = torch.softmax(score, -1)
    out = torch.einsum("hij,jhd->ihd", weight * is_hot, forms[1])
    out += torch.einsum("hij,jhd->ihd", weight * ~is_hot, forms[3])
    return out, lse.T


def _sealed_form(case: Case, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size, dim = case.shape.page_size, case.shape.head_dim
    k_sealed, v_sealed = k.float().clone(), v.float().clone()
    stored = k.dtype if case.fmt.name == "exact" else torch.float32
    params = case.params
    for start in range(0, k.shape[0] - size + 1, size):
        tokens = slice(start, start + size)
        k_page, v_page = (x[tokens].transpose(0, 1).unsqueeze(0) for x in (k, v))
        position = torch.tensor([case.first_position + start])
        page = case.fmt.encode(k_page, v_page, params, position)
        k_page, v_page = case.fmt.decode(page, size, dim, stored, params)
        k_sealed[tokens], v_sealed[tokens] = k_page[0].transpose(0, 1), v_page[0].transpose(0, 1)
    return k_sealed, v_sealed
