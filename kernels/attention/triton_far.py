"""Far keys on a GPU: sealed pages decoded into a workspace, and attention over it (`far.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.dense import DenseAttention
from kvmesh.kernels.attention.far import FarKeys, workspace_numbers
from kvmesh.kernels.attention.triton_form import Form
from kvmesh.kernels.attention.triton_launch import Geometry, prefill_launch
from kvmesh.kernels.attention.triton_pages import NUM_WARPS, decode_pages_kernel
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.gpu import gpu_of


@dataclass(frozen=True, slots=True)
class FarLaunches:
    """The far keys of a step's chunks.

    form: as `prefill_launch` makes it; workspace: [2 * KV heads * tokens * head_dim] in q's dtype,
        which layers and pieces use one after the other
    """

    keys: tuple[FarKeys, ...]
    dense: DenseAttention
    batch: AttentionBatch
    form: Form
    scale: float
    workspace: torch.Tensor

    def run(
        self, q: torch.Tensor, sealed: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Add the far keys to `out` and `lse`, which have the near ones; all as in
        `paged_attention`."""
        for keys in self.keys:
            queries, near_lse = q[keys.tokens], lse[keys.tokens]
            total = out[keys.tokens].float()
            for first, end in keys.pieces(self.batch.page_size):
                k, v = self._decoded(sealed, keys.seq, first, end)
                part, part_lse = self.dense.attend(queries, k, v, self.scale)
                share = torch.sigmoid(part_lse - near_lse).unsqueeze(-1)
                total.mul_(1.0 - share).addcmul_(part, share)
                torch.logaddexp(near_lse, part_lse, out=near_lse)
            out[keys.tokens] = total

    def _decoded(
        self, sealed: torch.Tensor, seq: int, first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of columns [first, end), each [KV heads, tokens, head_dim]."""
        num_kv_heads = sealed.shape[1]
        num_tokens = (end - first) * self.batch.page_size
        half = num_kv_heads * num_tokens * self.form.head_dim
        k, v = self.workspace[: 2 * half].view(2, num_kv_heads, num_tokens, -1)
        table = self.batch.sealed_tables
        decode_pages_kernel[(end - first, num_kv_heads)](
            sealed,
            k,
            v,
            self.batch.rows,
            table,
            table.stride(0),
            seq,
            first,
            num_tokens,
            self.form,
            num_warps=NUM_WARPS,
        )
        return k, v


def warm_up(hot: torch.Tensor, num_heads: int, fmt: KVFormat, dense: DenseAttention) -> None:
    """Attend from one token to one page of zeros, as large chunks do to many."""
    num_kv_heads, page_size, head_dim = hot.shape[2:]
    form = prefill_launch(fmt, Geometry.of(hot, num_heads), gpu_of(hot).capability).form
    ids = torch.zeros(1, 1, dtype=torch.int32, device=hot.device)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device=hot.device),
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
    keys = (FarKeys(0, slice(0, 1), 0, 1),)
    size = workspace_numbers(keys, page_size, num_kv_heads, head_dim)
    page_bytes = fmt.page_bytes(page_size, head_dim, hot.element_size())
    sealed = torch.zeros(1, num_kv_heads, page_bytes, dtype=torch.int8, device=hot.device)
    q = torch.zeros(1, num_heads, head_dim, dtype=hot.dtype, device=hot.device)
    lse = torch.zeros(1, num_heads, device=hot.device)
    launches = FarLaunches(keys, dense, batch, form, 1.0, hot.new_empty(size))
    launches.run(q, sealed, torch.zeros_like(q), lse)
