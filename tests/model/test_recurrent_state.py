"""Rows of recurrent states, and the recurrences that use them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridRMSNormGated,
)

from kvmesh.workers.model.linear_scan import linear_scan
from kvmesh.workers.model.mamba2 import GatedGroupNorm, scan_chunks, step_once
from kvmesh.workers.model.recurrent_state import RecurrentStates, StepStates
from kvmesh.workers.model.state_shape import StateShape
from kvmesh.workers.parallel.comm import Communicator

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


def test_groups_that_heads_share_are_whole_on_every_rank_or_common_to_some() -> None:
    shape = StateShape(2, 6 * 8 + 3 * 10, 3, (6, 8, 5), 6, shared_groups=3, shared_channels=10)
    assert [ranks for ranks in range(1, 13) if shape.divides_by(ranks)] == [1, 3, 6]
    assert [shape.shared_of(rank, 3) for rank in range(3)] == [(0, 1), (1, 2), (2, 3)]
    assert [shape.shared_of(rank, 6)[0] for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert shape.of_rank(1) == shape
    part = shape.of_rank(6)
    assert (part.channels, part.memory, part.shared_groups) == (8 + 10, (1, 8, 5), 1)


@pytest.mark.parametrize("tokens", [2, 64, 65, 70 * 16 + 3])
def test_chunks_of_mamba_2_equal_its_recurrence(tokens: int) -> None:
    """Also where a step ends within one of them, and the next one continues."""
    torch.manual_seed(0)
    n, heads, dim, groups, size = 2, 4, 3, 2, 5
    x = torch.randn(n, tokens, heads, dim)
    log_decay = -3.0 * torch.rand(n, tokens, heads)
    b, c = torch.randn(2, n, tokens, groups, size)
    memory = torch.randn(n, heads, dim, size)
    expected, state = [], memory
    for t in range(tokens):
        one = slice(t, t + 1)
        out, state = step_once(x[:, one], log_decay[:, one], b[:, one], c[:, one], state)
        expected.append(out)
    outs, after = [], memory
    for part in (slice(0, tokens // 3), slice(tokens // 3, tokens)):
        if part.start < part.stop:
            out, after = scan_chunks(x[:, part], log_decay[:, part], b[:, part], c[:, part], after)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), torch.cat(expected, 1), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(after, state, rtol=1e-5, atol=2e-5)


class _OneOf(Communicator):
    """A rank whose sums are computed from what all ranks have given it before."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.given: list[torch.Tensor] = []
        self.total: torch.Tensor | None = None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.given.append(tensor)
        return tensor if self.total is None else self.total


@pytest.mark.parametrize(("groups", "ranks"), [(1, 4), (2, 4), (2, 2), (4, 2)])
def test_a_norm_over_groups_is_the_same_on_any_number_of_ranks(groups: int, ranks: int) -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(2, 5, 32)
    whole = GraniteMoeHybridRMSNormGated(32, 32 // groups, eps=1e-3)
    torch.nn.init.normal_(whole.weight)
    parts = []
    for rank in range(ranks):
        share = slice(rank * 32 // ranks, (rank + 1) * 32 // ranks)
        part = GraniteMoeHybridRMSNormGated(32 // ranks, 1, eps=1e-3)
        part.weight = torch.nn.Parameter(whole.weight[share])
        comm = _OneOf(rank, ranks)
        parts.append((GatedGroupNorm(part, groups, comm), comm, share))
    for norm, _, share in parts:
        norm(x[:, share], gate[:, share])
    for _, comm, _ in parts:
        given = [other.given[0] for _, other, _ in parts if other.given]
        comm.total = sum(given[1:], given[0]) if given else None
    found = torch.cat([norm(x[:, share], gate[:, share]) for norm, _, share in parts], dim=-1)
    torch.testing.assert_close(found, whole(x, gate))


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
