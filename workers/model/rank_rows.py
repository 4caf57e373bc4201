"""Which rows of a weight a rank has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvmesh.workers.model.shard_plans import Shard
from kvmesh.workers.model.state_shape import StateShape
from kvmesh.workers.parallel.comm import Communicator

Range = tuple[int, int]  # first and end
# Rows that are one part of a weight's, and which of these the rank has.
_Part = tuple[int, Callable[[int], Range]]


def _part_of(total: int, index: int, count: int) -> Range:
    """One of `count` equal parts of a dimension."""
    assert total % count == 0, "call check_tp first"
    size = total // count
    return index * size, (index + 1) * size


class RankRows:
    """Ranges of the rows of a weight that a rank has, by the weight's shard.

    state: of a model with recurrent layers
    """

    def __init__(self, comm: Communicator, config: Any, state: StateShape | None) -> None:
        self._comm = comm
        self._config = config
        self._recurrent = state

    def of(self, shard: Shard, total: int) -> list[Range]:
        """Of a weight with so many rows, in the order in which the rank keeps them."""
        ranges, start = [], 0
        for rows, share in _PARTS[shard](self, total):
            first, end = share(rows)
            ranges.append((start + first, start + end))
            start += rows
        assert start == total
        return ranges

    def all_ranks(self, total: int) -> Range:
        """This rank's part of a dimension that all ranks divide."""
        return _part_of(total, self._comm.rank, self._comm.size)

    def heads(self, total: int) -> Range:
        """This rank's part of a dimension that is divided with the heads; the kvp ranks that have
        the same heads have the same part."""
        return _part_of(total, self._comm.tp_rank, self._comm.tp)

    @property
    def _state(self) -> StateShape:
        assert self._recurrent is not None
        return self._recurrent

    def _groups(self, total: int) -> Range:
        """This rank's part of rows that groups of a recurrent layer's heads share."""
        first, end = self._state.shared_of(self._comm.rank, self._comm.size)
        size = total // self._state.shared_groups
        return first * size, end * size

    def _queries_keys_values(self) -> list[_Part]:
        config = self._config
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        keys = (config.num_key_value_heads * head_dim, self.heads)
        return [(config.num_attention_heads * head_dim, self.heads), keys, keys]

    def _channels(self) -> list[_Part]:
        """Of a convolution before a recurrence: queries, keys and values of delta nets; of Mamba-2,
        x of all heads, and B and C of groups of them."""
        state = self._state
        if state.shared_groups:
            grouped = state.shared_groups * state.shared_channels
            each = (grouped // 2, self._groups)
            return [(state.channels - grouped, self.all_ranks), each, each]
        heads, _, value_dim = state.memory
        values = (heads * value_dim, self.all_ranks)
        keys = ((state.channels - heads * value_dim) // 2, self.all_ranks)
        return [keys, keys, values]

    def _gate_channels_steps(self) -> list[_Part]:
        channels = self._channels()
        return [channels[0], *channels, (self._state.memory[0], self.all_ranks)]


def _whole(total: int) -> Range:
    return 0, total


_PARTS: Mapping[Shard, Callable[[RankRows, int], list[_Part]]] = {
    "rows": lambda rank, total: [(total, rank.all_ranks)],
    "weight rows": lambda rank, total: [(total, rank.all_ranks)],
    "rows of heads": lambda rank, total: [(total, rank.heads)],
    "weight rows of heads": lambda rank, total: [(total, rank.heads)],
    "split norm": lambda rank, total: [(total, rank.heads)],
    "every row": lambda _, total: [(total, _whole)],
    "queries, keys, values": lambda rank, _: rank._queries_keys_values(),
    "gate, up": lambda rank, total: [(total // 2, rank.all_ranks)] * 2,
    "channels": lambda rank, _: rank._channels(),
    "convolution": lambda rank, _: rank._channels(),
    "gate, channels, steps": lambda rank, _: rank._gate_channels_steps(),
}
