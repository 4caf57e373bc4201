"""Attention of one step over a rank's pages, as the model's layers call it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.attention import paged_attention
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, ModelParams
from kvmesh.kernels.formats.rotation import Rotation
from kvmesh.kernels.layer import LayerRun
from kvmesh.kernels.merge import merge_sinks
from kvmesh.kernels.pointwise import rope_write
from kvmesh.kernels.seal import seal_layers, seal_pages
from kvmesh.kernels.write import write_hot
from kvmesh.workers.basis import Basis
from kvmesh.workers.kv_pool import KVPool
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.heads import merge_over_ranks, of_pieces, order_of_ranks
from kvmesh.workers.step import StepTensors


@dataclass(frozen=True, slots=True)
class RankAttention:
    """What is the same in every step of a rank.

    params: calibrated parameters for the rank's heads, if the format needs them
    """

    fmt: KVFormat
    pool: KVPool
    basis: Basis
    comm: Communicator
    head_dim: int
    params: ModelParams | None = None


class StepAttention:
    """Of one step; layers use it one after the other."""

    def __init__(self, rank: RankAttention, step: StepTensors) -> None:
        self._rank = rank
        self._step = step
        # In a decode step no query reads what the step seals: those pages are still in every
        # query's exact window. So they can be sealed after the model, in all layers together.
        self._seals_last = step.batch.max_query_len == 1
        self._order = None
        batch = step.batch
        if batch.deterministic and batch.firsts is not None:
            num_tokens = step.slots.shape[0]
            counts = batch.query_starts.diff()
            self._order = order_of_ranks(batch.firsts, counts, num_tokens, rank.comm)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttendArgs
    ) -> torch.Tensor:
        hot, slots, _ = self.target(layer)
        basis = self._rank.basis
        if args.rope is not None:
            q = rope_write(q, k, basis.enter_values(v), *args.rope, hot, slots)
        else:
            q, k, v = basis.enter(q, k, v)
            write_hot(k, v, hot, slots)
        return self.read(layer, q, args)

    def target(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, Rotation | None]:
        return self._rank.pool.hot[layer], self._step.slots, self._rank.basis.values

    def read(self, layer: int, q: torch.Tensor, args: AttendArgs) -> torch.Tensor:
        rank, step = self._rank, self._step
        hot, sealed = rank.pool.hot[layer], rank.pool.sealed[layer]
        params = NO_PARAMS if rank.params is None else rank.params.layers[layer]
        if not self._seals_last and step.seal_hot.shape[0]:
            seal_pages(
                hot,
                sealed,
                step.seal_hot,
                step.seal_sealed,
                fmt=rank.fmt,
                params=params,
                positions=step.seal_positions,
            )
        out, lse = paged_attention(
            q,
            hot,
            sealed,
            step.batch,
            fmt=rank.fmt,
            scale=args.scale,
            params=params,
            softcap=args.softcap,
            sliding_window=args.sliding_window,
        )
        out, sinks = rank.basis.leave(out), args.sinks
        if rank.comm.kvp > 1:
            out, lse = merge_over_ranks(out, lse, rank.comm, self._order)
            if sinks is not None:
                sinks = of_pieces(sinks, rank.head_dim, rank.comm)
        if sinks is not None:
            out, _ = merge_sinks(out, lse, sinks)
        return out

    def through(
        self, run: LayerRun, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> bool:
        rank, step = self._rank, self._step
        if not self._seals_last or rank.comm.kvp > 1 or gpu.runs_kernels(rank.pool.all_hot):
            return False
        pages = (rank.pool.all_hot, rank.pool.all_sealed)
        rotations = (rank.basis.values, rank.basis.values_back)
        arguments = (hidden, cos, sin, step.slots, *pages, step.batch)
        return run(*arguments, fmt=rank.fmt, rotations=rotations)

    def finish(self) -> None:
        """Seal what no layer has sealed."""
        rank, step = self._rank, self._step
        if self._seals_last and step.seal_hot.shape[0]:
            seal_layers(
                rank.pool.all_hot,
                rank.pool.all_sealed,
                step.seal_hot,
                step.seal_sealed,
                fmt=rank.fmt,
                params=rank.params,
                positions=step.seal_positions,
            )
