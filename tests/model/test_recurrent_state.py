"""Rows of recurrent states, and the recurrences that use them."""

from __future__ import annotations

import numpy as np
import torch

from kvmesh.workers.model.recurrent_state import RecurrentStates, StepStates
from kvmesh.workers.model.rg_lru import linear_scan
from kvmesh.workers.model.state_shape import StateShape

CPU = torch.device("cpu")
SHAPE = StateShape(layers=2, channels=4, tail=3, memory=(4, 2, 5), groups=2)


def step_of(
    states: RecurrentStates, rows: list[int], positions: list[int], starts: list[int]
) -> StepStates:
    ids, query_starts = (torch.tensor(x, dtype=torch.int32) for x in (rows, starts))
    return states.step(ids, torch.tensor(positions), query_starts, np.array(starts))


def test_the_bytes_of_ranks_are_parts_of_all() -> None:
    assert SHAPE.num_bytes(2) == 2 * (4 * 3 * 2 + 4 * 2 * 5 * 4)
    assert SHAPE.of_rank(2).num_bytes(2) * 2 == SHAPE.num_bytes(2)
    assert SHAPE.of_rank(2).memory == (2, 2, 5)


def test_a_state_is_kept_in_its_row_and_is_zero_where_a_sequence_begins() -> None:
    states = RecurrentStates(SHAPE, 3, torch.float32, CPU)
    step = step_of(states, [2, 0], [0, 1, 0], [0, 2, 3])
    tails, memories = step.read(1)
    step.write(1, tails + 1, memories + torch.tensor([3.0, 4.0])[:, None, None, None])
    states.memories[1, 1] = float("nan")  # of a sequence that has ended
    step = step_of(states, [1, 2, 0], [0, 2, 1], [0, 1, 2, 3])
    tails, memories = step.read(1)
    assert [float(memory.amax()) for memory in memories] == [0, 3, 4]
    assert [float(tail.amin()) for tail in tails] == [0, 1, 1]
    assert not step.read(0)[1].any()


def test_padding_of_graphs_changes_no_row() -> None:
    states = RecurrentStates(SHAPE, 2, torch.float32, CPU)
    step = step_of(states, [1, 0, 0], [5, 0, 0], [0, 1, 1, 1])
    (part,) = step.parts
    assert part.length == 1
    tails, memories = step.read(0)
    step.write(0, tails + 1, memories + 1)
    assert states.memories[0, 1].all()
    assert not states.memories[0, 0].any()


def test_chunks_of_one_token_are_computed_together() -> None:
    states = RecurrentStates(SHAPE, 4, torch.float32, CPU)
    step = step_of(states, [0, 1, 2, 3], [4, 0, 1, 2, 9, 0, 1], [0, 1, 4, 5, 7])
    alone, *chunks = step.parts
    assert isinstance(alone.tokens, torch.Tensor)
    assert isinstance(alone.seqs, torch.Tensor)
    assert (alone.tokens.tolist(), alone.seqs.tolist()) == ([0, 4], [0, 2])
    assert [(part.tokens, part.seqs) for part in chunks] == [
        (slice(1, 4), slice(1, 2)),
        (slice(5, 7), slice(3, 4)),
    ]


def test_a_scan_equals_a_loop() -> None:
    torch.manual_seed(0)
    for length in (1, 2, 7, 64, 65):
        keep, added = torch.rand(2, length, 3), torch.randn(2, length, 3)
        before = torch.randn(2, 3)
        expected, memory = [], before
        for t in range(length):
            memory = keep[:, t] * memory + added[:, t]
            expected.append(memory)
        found = linear_scan(keep, added, before)
        torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-5, atol=1e-5)
