"""What the decode loop on CPUs reads besides queries, as records of addresses and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmesh.kernels.addresses_numba import Record, record_of
from kvmesh.kernels.exp2_numba import LOG2_E


def _record_type(**fields: Any) -> np.dtype[Any]:
    return np.dtype(list(fields.items()), align=True)


# The decoding sequences of a step and its tables: addresses of int64, of int32 for tables.
# group_starts [groups + 1], members [num_members]: the decoding sequences, group by group
# shared_pages [groups]: how many sealed pages after the sink the whole group shares
# tokens, seq_lens, table_rows, firsts [num_seqs]; tokens: a sequence's row of q
# hot_tables, sealed_tables [num_rows, max_pages]
# largest_group: sequences of it; splits: the number of parts in which a group's pages are read
# sink_pages, recent_pages, stride: see `AttentionBatch`
SEQUENCES = _record_type(
    **dict.fromkeys(
        (
            *("group_starts", "members", "shared_pages"),
            *("tokens", "seq_lens", "table_rows", "firsts", "hot_tables", "sealed_tables"),
            *("num_groups", "num_members", "num_seqs", "num_rows", "max_pages"),
            *("largest_group", "splits", "sink_pages", "recent_pages", "stride"),
        ),
        np.int64,
    )
)
# A layer's pages, addresses and their numbers, and what it does with them.
# scale: converts to base-2 scores, or with a softcap to natural-log scores; softcap: 0 for none
# window: as in `window.py`, 0 for none
PAGES = _record_type(
    hot=np.int64,
    sealed=np.int64,
    num_hot=np.int64,
    num_sealed=np.int64,
    num_heads=np.int64,
    num_kv_heads=np.int64,
    window=np.int64,
    scale=np.float32,
    softcap=np.float32,
)


def pages_record(
    hot: int,
    sealed: int,
    num_pages: tuple[int, int],
    heads: tuple[int, int],
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Record:
    """PAGES. num_pages: hot, sealed; heads: query heads, KV heads; the rest as in
    `paged_attention`"""
    return record_of(
        PAGES,
        hot=hot,
        sealed=sealed,
        num_hot=num_pages[0],
        num_sealed=num_pages[1],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        window=window or 0,
        scale=scale if softcap else float(scale * LOG2_E),  # a product in fp32
        softcap=softcap or 0.0,
    )
