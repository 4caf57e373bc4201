"""Steps that compile every kernel or loop that serving will run, before the first request.

What is compiled depends on the format, the model's layers and the kind of step, never on lengths
or on how many sequences there are (`benchmarks/launches.py` counts it). So one step of each kind is
enough; all of them read and write page 0 of an empty pool.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvmesh.kernels import workspace
from kvmesh.workers.shared_prefixes import PrefixSets
from kvmesh.workers.step import BlockTables, StepArrays


def warm_up_steps(tables: BlockTables, min_members: int, *, divides: bool) -> Iterator[StepArrays]:
    """For tables whose entries are all page 0.

    min_members: minimum number of sequences in a set of shared prefixes
    divides: whether many keys of a block of queries are read in parts, by other kernels
    """
    num_rows, max_pages = tables.hot.shape
    size, exact = tables.page_size, tables.sink_pages + tables.recent_pages
    longest = max_pages * size  # at least
    yield _step(tables, [1], 1, seals=True)
    if longest > 1:
        yield _step(tables, [2], 2, seals=True)
        yield _step(tables, [2], 2, seals=False)
    many = workspace.PREFILL_CHUNK_TOKENS + (exact + 2) * size  # in parts from here on
    if divides and many <= longest:
        yield _step(tables, [many], 2, seals=False)
    shared = (exact + 2) * size
    if min_members <= num_rows and shared <= longest:
        members = np.arange(min_members)
        starts = np.array([0, min_members])
        prefixes = PrefixSets(np.ones_like(members), members, starts)
        yield _step(tables, [shared] * min_members, 1, seals=False, prefixes=prefixes)


def _step(
    tables: BlockTables,
    lengths: list[int],
    new: int,
    *,
    seals: bool,
    prefixes: PrefixSets | None = None,
) -> StepArrays:
    """Sequences of these lengths, with as many new tokens each, whose slots are in page 0."""
    ends = np.array(lengths)
    count = new * len(ends)
    starts = np.arange(len(ends) + 1) * new
    positions = np.repeat(ends - new, new) + np.tile(np.arange(new), len(ends))
    page = np.zeros(1 if seals else 0, dtype=np.int64)
    return StepArrays(
        input_ids=np.zeros(count, dtype=np.int64),
        positions=positions,
        slots=positions % tables.page_size,
        logits_rows=starts[1:] - 1,
        query_starts=starts,
        seq_lens=ends,
        rows=np.arange(len(ends)),
        seal_hot=page,
        seal_sealed=page,
        seal_positions=page,
        prefixes=prefixes,
        firsts=None if tables.stride == 1 else np.zeros_like(ends),
    )
