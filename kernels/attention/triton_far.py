"""Far keys on a GPU: sealed pages decoded into a workspace, and attention over it (`far.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.dense import DenseAttention
from kvmesh.kernels.attention.far import FarKeys, workspace_numbers
from kvmesh.kernels.attention.triton_form import Form, Geometry
from kvmesh.kernels.attention.triton_launch import prefill_launch
from kvmesh.kernels.attention.triton_pages import NUM_WARPS, decode_pages_kernel
from kvmesh.kernels.direct import BoundKernel, Grid
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.gpu import gpu_of


@dataclass(frozen=True, slots=True)
class _Piece:
    """Pages that are decoded at a time: how, and where to, [KV heads, tokens, head_dim] each."""

    kernel: BoundKernel
    grid: Grid
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class FarLaunches:
    """The far keys of a step's chunks: rows of q that see them, and their pieces."""

    chunks: tuple[tuple[slice, tuple[_Piece, ...]], ...]
    dense: DenseAttention
    scale: float

    @classmethod
    def of(
        cls,
        keys: tuple[FarKeys, ...],
        dense: DenseAttention,
        batch: AttentionBatch,
        form: Form,
        scale: float,
        like: torch.Tensor,
    ) -> FarLaunches:
        """form: as `prefill_launch` makes it; like: any layer's q"""
        size = workspace_numbers(keys, batch.page_size, form.num_kv_heads, form.head_dim)
        # Layers and pieces use it one after the other.
        workspace = torch.empty(size, dtype=like.dtype, device=like.device)
        table = batch.sealed_tables

        def piece(seq: int, first: int, end: int) -> _Piece:
            num_tokens = (end - first) * batch.page_size
            shape = (2, form.num_kv_heads, num_tokens, form.head_dim)
            k, v = workspace[: math.prod(shape)].view(shape)
            fixed = (batch.rows, table, table.stride(0), seq, first, num_tokens, form)
            kernel = BoundKernel(decode_pages_kernel, fixed, {"num_warps": NUM_WARPS})
            return _Piece(kernel, (end - first, form.num_kv_heads, 1), k, v)

        chunks = tuple(
            (one.tokens, tuple(piece(one.seq, *at) for at in one.pieces(batch.page_size)))
            for one in keys
        )
        return cls(chunks, dense, scale)

    def run(
        self, q: torch.Tensor, sealed: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Add the far keys to `out` and `lse`, which have the near ones; all as in
        `paged_attention`."""
        for tokens, pieces in self.chunks:
            queries, near_lse = q[tokens], lse[tokens]
            total = out[tokens].float()
            for piece in pieces:
                piece.kernel(piece.grid, sealed, piece.k, piece.v)
                part, part_lse = self.dense.attend(queries, piece.k, piece.v, self.scale)
                share = torch.sigmoid(part_lse - near_lse).unsqueeze(-1)
                total.mul_(1.0 - share).addcmul_(part, share)
                torch.logaddexp(near_lse, part_lse, out=near_lse)
            out[tokens] = total


def warm_up(hot: torch.Tensor, num_heads: int, fmt: KVFormat, dense: DenseAttention) -> None:
    """Attend from one token to one page of zeros, as large chunks do to many."""
    num_kv_heads, page_size, head_dim = hot.shape[2:]
    form = prefill_launch(fmt, Geometry.of(hot, num_heads), gpu_of(hot).capability).form
    batch = AttentionBatch.of_one_token(page_size, hot.device)
    keys = (FarKeys(0, slice(0, 1), 0, 1),)
    page_bytes = fmt.page_bytes(page_size, head_dim, hot.element_size())
    sealed = torch.zeros(1, num_kv_heads, page_bytes, dtype=torch.int8, device=hot.device)
    q = torch.zeros(1, num_heads, head_dim, dtype=hot.dtype, device=hot.device)
    lse = torch.zeros(1, num_heads, device=hot.device)
    launches = FarLaunches.of(keys, dense, batch, form, 1.0, q)
    launches.run(q, sealed, torch.zeros_like(q), lse)
