"""Which pages a query reads, and in which form: the one place that knows on the host.

The query at position i, in page P, reads

    0      sink            P - recent        P
    | hot  | sealed        | hot             |
             from the first page of which its sliding window shows any token on

How far back a query sees is one integer:

    w > 0   a window that slides: the query at position i sees keys (i - w, i]
    w < 0   chunks of -w tokens: it sees those keys of its own chunk that are not after it
    None    the whole context

Where only every stride-th page of a sequence is here, pages are counted in columns of its tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvmesh.kernels.attention.batch import AttentionBatch

Ints = npt.NDArray[np.int64]


def first_seen(positions: Ints, window: int) -> Ints:
    """The first position that queries at these positions see; grows with the position."""
    if window < 0:
        return positions // -window * -window
    return np.maximum(positions - window + 1, 0)


def columns_below(pages: Any, firsts: Any, stride: int) -> Any:
    """How many of the logical pages firsts, firsts + stride, … are below `pages`; of ints or of
    arrays alike."""
    return np.maximum(-((firsts - pages) // stride), 0)


@dataclass(frozen=True, slots=True)
class Windows:
    """See the module; fields as in `AttentionBatch`.

    positions: of queries, [n]; firsts: [n], the first logical page of each one's sequence that is
        here, or None where all pages are
    """

    page_size: int
    sink_pages: int
    recent_pages: int
    sliding_window: int | None
    stride: int = 1

    @classmethod
    def of(cls, batch: AttentionBatch, sliding_window: int | None) -> Windows:
        return cls(
            batch.page_size, batch.sink_pages, batch.recent_pages, sliding_window, batch.stride
        )

    def chunk_pages(self, tokens: int) -> int:
        return max(1, tokens // self.page_size)

    def columns(self, pages: Any, firsts: Any) -> Any:
        """How many columns of the sequences have pages below these."""
        return pages if firsts is None else columns_below(pages, firsts, self.stride)

    def first_pages(self, positions: Ints) -> Ints:
        """The first page of which a query sees any token."""
        if self.sliding_window is None:
            return np.zeros_like(positions)
        return first_seen(positions, self.sliding_window) // self.page_size

    def sealed(self, positions: Ints, firsts: Ints | None) -> tuple[Ints, Ints]:
        """Columns of the sealed pages that queries read: first and end."""
        first = np.maximum(self.first_pages(positions), self.sink_pages)
        end = np.maximum(first, positions // self.page_size - self.recent_pages)
        return self.columns(first, firsts), self.columns(end, firsts)

    def hot(self, positions: Ints, firsts: Ints | None) -> tuple[Ints, Ints, Ints, Ints]:
        """Columns of the hot pages that queries read: first and end in the sink, then first and
        end of the recent ones."""
        end = positions // self.page_size + 1
        seen = self.columns(self.first_pages(positions), firsts)
        sink_end = self.columns(np.minimum(self.sink_pages, end), firsts)
        recent = np.maximum(self.sink_pages, end - 1 - self.recent_pages)
        recent = np.maximum(self.columns(recent, firsts), seen)
        return seen, np.maximum(sink_end, seen), recent, self.columns(end, firsts)
