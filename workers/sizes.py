"""The arithmetic of pages, shared by the engine, the router and the planner.

A sequence's positions fall into pages of `page_size` tokens. A query in page P reads key j
exactly if page(j) is a sink page or page(j) ≥ P − recent; otherwise in its sealed form. So a
sequence of n tokens, whose next token falls into page P = n // page_size, holds

    sealed   [sink, P − recent)           one sealed page each
    hot      [0, sink) ∪ [P − recent, P]  one hot page each

With kvp > 1 pages are dealt to kvp ranks in turn, and all counts are those of the rank that
has most.

Torch-free on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmesh.kernels.formats.base import KVFormat

# Groups' prefixes are compared in blocks of this many pages: the router stores the digest of
# each block's last page, and engines report no other digests.
BLOCK_PAGES = 8


@dataclass(frozen=True, slots=True)
class PageNeed:
    """Pages of one rank; if ranks hold different numbers of them, of that which has most."""

    hot: int
    sealed: int

    def __str__(self) -> str:
        return f"{self.hot} hot and {self.sealed} sealed pages"

    def __add__(self, other: PageNeed) -> PageNeed:
        return PageNeed(self.hot + other.hot, self.sealed + other.sealed)

    def __sub__(self, other: PageNeed) -> PageNeed:
        return PageNeed(self.hot - other.hot, self.sealed - other.sealed)

    def or_more(self, other: PageNeed) -> PageNeed:
        return PageNeed(max(self.hot, other.hot), max(self.sealed, other.sealed))

    def fits(self, room: PageNeed) -> bool:
        return self.hot <= room.hot and self.sealed <= room.sealed


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """Shapes and windows that convert tokens to pages, and pages to bytes.

    hot_page_bytes, sealed_page_bytes: of one page on one rank, over all its layers and KV heads
    state_bytes: of a sequence's recurrent state on one rank, whatever its length
    ranks: of the group, tp · kvp
    kvp: to how many ranks consecutive pages are dealt in turn (deal.py)
    """

    page_size: int
    sink_pages: int
    recent_pages: int
    hot_page_bytes: int
    sealed_page_bytes: int
    state_bytes: int = 0
    ranks: int = 1
    kvp: int = 1

    def on_fullest(self, pages: int) -> int:
        """Of that many consecutive pages, how many the rank has that has most."""
        return -(-pages // self.kvp)

    def sealed_range(self, num_tokens: int) -> range:
        """Logical pages that are sealed once `num_tokens` have been written."""
        return range(
            self.sink_pages, max(self.sink_pages, num_tokens // self.page_size - self.recent_pages)
        )

    def sealed_need(self, num_tokens: int) -> int:
        """Sealed pages of the rank that has most, once `num_tokens` have been written."""
        return self.on_fullest(len(self.sealed_range(num_tokens)))

    def tokens_within(self, sealed_pages: int) -> int:
        """The maximum number of tokens a sequence can write with that many sealed pages."""
        sealed = sealed_pages * self.kvp
        return (self.sink_pages + self.recent_pages + sealed + 1) * self.page_size - 1

    def hot_per_sequence(self) -> int:
        """The maximum number of hot pages a sequence holds between steps: sink + recent + 1."""
        return self.on_fullest(self.sink_pages) + self.on_fullest(self.recent_pages + 1)

    def need(self, num_tokens: int) -> PageNeed:
        """Pages that a sequence of `num_tokens` written tokens holds between steps."""
        pages = -(-num_tokens // self.page_size)
        sealed = len(self.sealed_range(num_tokens))
        sink = min(pages, self.sink_pages)
        hot = self.on_fullest(sink) + self.on_fullest(pages - sealed - sink)
        return PageNeed(hot if sealed else self.on_fullest(pages), self.on_fullest(sealed))

    def peak_need(self, num_tokens: int) -> PageNeed:
        """Pages that are enough for a sequence at every length up to `num_tokens`.

        The additional page that a step across a page boundary holds is not counted: it
        belongs to the pool's headroom for the step in flight.
        """
        pages = -(-num_tokens // self.page_size)
        sink = min(pages, self.sink_pages)
        hot = self.on_fullest(sink) + self.on_fullest(pages - sink)
        return PageNeed(
            hot=min(hot, self.hot_per_sequence()),
            sealed=self.sealed_need(num_tokens),
        )

    def bytes_held(self, pages: PageNeed, sequences: int = 0) -> int:
        """Bytes of that many logical pages, each of which tp ranks hold a part of. sequences: how
        many, whose states are added"""
        part = pages.hot * self.hot_page_bytes + pages.sealed * self.sealed_page_bytes
        return part * self.ranks // self.kvp + sequences * self.state_bytes * self.ranks

    def bytes_of(self, need: PageNeed, sequences: int = 0) -> int:
        """Bytes over all ranks, if all had as many pages as the fullest. sequences: how many,
        whose states are added"""
        per_rank = need.hot * self.hot_page_bytes + need.sealed * self.sealed_page_bytes
        return (per_rank + sequences * self.state_bytes) * self.ranks


def kv_heads_of_rank(num_kv_heads: int, tp: int) -> int:
    """Of tp ranks that divide a model's KV heads. The only head of latent attention is whole on
    every one of them."""
    return max(1, num_kv_heads // tp)


def page_bytes_of(
    fmt: KVFormat,
    *,
    num_layers: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype_bytes: int,
) -> tuple[int, int]:
    """Bytes of one hot and one sealed page over all layers and KV heads of a rank.

    dtype_bytes: size of the compute dtype. Raises ValueError if the format does not support
    head_dim.
    """
    heads = num_layers * num_kv_heads
    hot = heads * fmt.stored_sides * page_size * head_dim * dtype_bytes
    return hot, heads * fmt.page_bytes(page_size, head_dim, dtype_bytes)
