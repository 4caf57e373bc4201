"""The attention to compute: the same for all layers of a step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvmesh.kernels.attention.work import Lengths, Round


@dataclass(frozen=True, eq=False, slots=True)
class SharedPrefixes:
    """Decoding sequences whose first sealed pages are the same, to be read once for all of them.

    pages: [num_seqs] int32, how many pages after the sink a sequence reads together with
        others, all of them sealed; 0 for a sequence that shares none
    members: [num_seqs] int32, the sharing sequences, set by set; the rest is unused
    starts: [num_sets + 1] int32, where each set's members begin; a set may be empty, has at
        most as many members as `sharers` allows, and all its members have the same `pages`
    """

    pages: torch.Tensor
    members: torch.Tensor
    starts: torch.Tensor

    def to(self, device: torch.device | str) -> SharedPrefixes:
        return SharedPrefixes(*(x.to(device) for x in (self.pages, self.members, self.starts)))


@dataclass(frozen=True, eq=False, slots=True)
class GivenDecodeWork:
    """`DecodeWork` on the device. In a captured graph its contents change between replays.

    starts: [num_seqs + 1] int32; set_chunks: [num_sets + 1] int32
    rounds: the work's, or one round of as many slots as there may be
    """

    starts: torch.Tensor
    set_chunks: torch.Tensor
    rounds: tuple[Round, ...]


@dataclass(frozen=True, eq=False, slots=True)
class AttentionBatch:
    """The sequences of one step, where their pages are, and which form each query reads.

    Sequences may be mixed: one new token (decode) or many (a prefill chunk).
    The query at position i, in page P = i // page_size, reads key j of page p
    from its hot page if p < sink_pages or p >= P - recent_pages, and otherwise
    from its sealed page.

    query_starts: [num_seqs + 1] int32, the first row of each sequence in q
    seq_lens: [num_seqs] int32, tokens including the new ones
    rows: [num_seqs] int32, the sequence's row in the tables
    hot_tables, sealed_tables: [num_rows, max_pages] int32, logical page -> page
        id; -1 where the page does not exist in that form
    max_query_len, max_seq_len: upper bounds, known to the host
    firsts, stride: where only every stride-th page of a sequence is here: [num_seqs] int32, the
        first of them; column c of its tables is then its logical page firsts + stride · c, and
        only those pages are read. None and 1 where all pages are here
    prefixes: pages to read once for several sequences; affects only rounding. Pages are counted
        in columns, after those of sink pages
    lengths: the sequences' lengths as the host knows them; without them, a backend that needs
        them waits for the device
    deterministic: every token is attended to in the same order of sums, whatever is computed with
        it: by one kernel, which is not the fastest for each
    decode_work: the step's `DecodeWork` by sliding window; derived where it is missing
    plans: what a backend derives from the above once per step; private to the backend
    """

    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    rows: torch.Tensor
    hot_tables: torch.Tensor
    sealed_tables: torch.Tensor
    page_size: int
    sink_pages: int
    recent_pages: int
    max_query_len: int
    max_seq_len: int
    firsts: torch.Tensor | None = None
    stride: int = 1
    prefixes: SharedPrefixes | None = None
    lengths: Lengths | None = None
    deterministic: bool = False
    decode_work: dict[int | None, GivenDecodeWork] = field(default_factory=dict)
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        num_seqs = self.seq_lens.shape[0]
        if self.query_starts.shape != (num_seqs + 1,) or self.rows.shape != (num_seqs,):
            raise ValueError(
                f"query_starts, rows: expected [{num_seqs + 1}] and [{num_seqs}], "
                f"got {tuple(self.query_starts.shape)} and {tuple(self.rows.shape)}"
            )
        if self.hot_tables.dim() != 2 or self.hot_tables.shape != self.sealed_tables.shape:
            raise ValueError(
                "hot_tables, sealed_tables: expected equal shapes [num_rows, max_pages], "
                f"got {tuple(self.hot_tables.shape)} and {tuple(self.sealed_tables.shape)}"
            )
        if (self.firsts is None) != (self.stride == 1) or self.stride < 1:
            raise ValueError(f"firsts: expected with a stride above 1 alone, got {self.stride}")
        if self.firsts is not None and self.firsts.shape != (num_seqs,):
            raise ValueError(f"firsts: expected [{num_seqs}], got {tuple(self.firsts.shape)}")
        if self.page_size < 1 or self.sink_pages < 0 or self.recent_pages < 0:
            raise ValueError(
                "page_size, sink_pages, recent_pages: expected >= 1, >= 0, >= 0, "
                f"got {self.page_size}, {self.sink_pages}, {self.recent_pages}"
            )

    @classmethod
    def of_one_token(cls, page_size: int, device: torch.device) -> AttentionBatch:
        """A sequence of one token in page 0, for warming up."""
        ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
        return cls(
            query_starts=torch.tensor([0, 1], dtype=torch.int32, device=device),
            seq_lens=ids[0] + 1,
            rows=ids[0],
            hot_tables=ids,
            sealed_tables=ids,
            page_size=page_size,
            sink_pages=0,
            recent_pages=0,
            max_query_len=1,
            max_seq_len=1,
        )

    def by_query(self) -> AttentionBatch:
        """Each new token as a sequence of its own that ends with it, derived on first use; without
        `prefixes`. Here and not on the device: for CPUs."""
        if self.max_query_len == 1 and self.prefixes is None:
            return self
        if "by query" not in self.plans:
            counts = self.query_starts.diff()
            ends = self.seq_lens.repeat_interleave(counts)
            rows = torch.arange(len(ends), dtype=torch.int32)
            last = self.query_starts[1:].repeat_interleave(counts) - 1
            self.plans["by query"] = replace(
                self,
                query_starts=torch.arange(len(ends) + 1, dtype=torch.int32),
                seq_lens=ends - (last - rows),
                rows=self.rows.repeat_interleave(counts),
                firsts=None if self.firsts is None else self.firsts.repeat_interleave(counts),
                max_query_len=1,
                prefixes=None,
                lengths=None,
                decode_work={},
            )
        return self.plans["by query"]  # type: ignore[no-any-return]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]
