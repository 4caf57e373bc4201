"""`paged_attention` in plain torch: the reference, and the serving path on CPUs.

It computes in fp32 whatever the dtype of q. Which form is read depends only on
positions (`Windows`); how the work is divided changes only rounding.
"""

from __future__ import annotations

import torch

from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.batch_pages import HotSlots, SealedPages
from kvmesh.kernels.attention.chunk_blocks import ChunkBlock, chunk_blocks
from kvmesh.kernels.attention.decode_groups import DecodeGroup, decode_groups
from kvmesh.kernels.attention.layer import LayerAttention
from kvmesh.kernels.formats.base import PageShape, Params, Side

# Maximum number of scores of one block, if they have to be stored: 32 MiB of fp32.
MAX_SCORES = 8 * 1024 * 1024


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    layer: LayerAttention,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, _ = q.shape
    groups = decode_groups(batch, hot.shape[1], hot.shape[2], layer.sliding_window)
    pages = _LayerPages(hot, sealed, layer)
    if len(groups) == 1 and groups[0].size == num_tokens:
        return pages.decode(q, groups[0])
    out = q.new_zeros(num_tokens, num_heads, pages.value_dim)
    lse = torch.full((num_tokens, num_heads), -torch.inf, dtype=torch.float32, device=q.device)
    for group in groups:
        out[group.tokens], lse[group.tokens] = pages.decode(q[group.tokens], group)
    attend_chunks(q, hot, sealed, batch, layer, out, lse)
    return out, lse


def attend_chunks(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    layer: LayerAttention,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Compute the sequences with several new tokens, writing into out and lse."""
    pages = _LayerPages(hot, sealed, layer)
    for block in chunk_blocks(batch, hot.shape[1], hot.shape[2], layer.sliding_window):
        out[block.tokens], lse[block.tokens] = pages.prefill(q[block.tokens], block)


class _LayerPages:
    """One layer's pages, and attention over parts of them.

    Where values are in keys, it sums whole keys: torch's attention on CPUs wants values as wide as
    keys, and what is too much is cut off at the end.
    """

    def __init__(self, hot: torch.Tensor, sealed: torch.Tensor, layer: LayerAttention) -> None:
        self.fmt, self.params = layer.fmt, layer.params
        self.scale, self.softcap = layer.scale, layer.softcap
        self.sides, self.num_kv_heads, self.page_size, self.head_dim = hot.shape[1:]
        self.value_dim = self.fmt.values_in_keys or self.head_dim
        self.hot = hot
        self.dtype = hot.dtype
        pages = sealed.view(-1, sealed.shape[-1])
        middle = self.fmt.k.num_bytes(self.page_size, self.head_dim, hot.element_size())
        self.sealed_k, self.sealed_v = pages[:, :middle], pages[:, middle:]

    def decode(self, q: torch.Tensor, group: DecodeGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """q [b, num_heads, head_dim], one query per sequence."""
        rows = group.size * self.num_kv_heads
        # The query heads of a group share a KV head, so they are treated as its queries.
        queries = (q.float() * self.scale).reshape(rows, -1, self.head_dim)
        parts = []
        if group.sealed is not None:
            parts.append(self._sealed_tokens(group.sealed))
        if group.hot is not None:
            k_hot, v_hot = self._hot_tokens(group.hot, rows)
            if group.invisible_hot is not None:
                # Slots after the last token may hold anything, and 0 * NaN is NaN.
                by_sequence = v_hot.view(group.size, self.num_kv_heads, -1, self.head_dim)
                by_sequence.masked_fill_(group.invisible_hot, 0.0)
            parts.append((k_hot, v_hot))
        k, v = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
        scores = torch.bmm(queries, k.mT)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if group.invisible is not None:
            by_sequence = scores.view(group.size, self.num_kv_heads, -1, scores.shape[-1])
            by_sequence.masked_fill_(group.invisible, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        # log Σ e^s from the best key only: its weight is e^(s - lse)
        lse = scores.amax(-1).sub_(weights.amax(-1).log_())
        out = torch.bmm(weights, v).view(q.shape)
        return out[..., : self.value_dim].to(q.dtype), lse.view(q.shape[:2])

    def prefill(self, q: torch.Tensor, block: ChunkBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """q [queries, num_heads, head_dim], consecutive tokens of one sequence."""
        queries = q.float().unflatten(1, (self.num_kv_heads, -1)).permute(1, 2, 0, 3)
        out = torch.zeros_like(queries)
        lse = torch.full(queries.shape[:-1], -torch.inf, device=q.device)
        parts = []
        if block.near_sealed is not None:
            parts.append(self._sealed_tokens(block.near_sealed))
        if block.hot is not None:
            parts.append(self._hot_tokens(block.hot, self.num_kv_heads))
        if parts:
            keys, values = zip(*parts, strict=True)
            k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
            out, lse = self._dense(queries, k, v, block.near_bias)
            if block.near_blind is not None:
                out = out.masked_fill(block.near_blind[:, None], 0.0)
                lse = lse.masked_fill(block.near_blind, -torch.inf)
        for piece in block.far:
            k, v = self._sealed_tokens(piece)
            far_out, far_lse = self._dense(queries, k, v, None)
            out = torch.lerp(out, far_out, torch.sigmoid(far_lse - lse).unsqueeze(-1))
            lse = torch.logaddexp(lse, far_lse)
        return (
            out.permute(2, 0, 1, 3).reshape(q.shape)[..., : self.value_dim].to(q.dtype),
            lse.permute(2, 0, 1).reshape(q.shape[:2]),
        )

    def _dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [num_kv_heads, group, queries, head_dim], k and v [num_kv_heads, keys, head_dim],
        bias [queries, keys] with at least one visible key per query -> out like q, lse without
        the last dimension"""
        if self.softcap is None and q.device.type == "cpu":
            heads = (-1, q.shape[1], -1, -1)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
                q,
                k.unsqueeze(1).expand(heads),
                v.unsqueeze(1).expand(heads),
                attn_mask=None if bias is None else bias[None, None],
                scale=self.scale,
            )
        step = max(1, MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[1]))
        outs, lses = [], []
        for start in range(0, q.shape[2], step):
            scores = torch.matmul(q[:, :, start : start + step] * self.scale, k.mT.unsqueeze(1))
            if self.softcap is not None:
                scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
            if bias is not None:
                scores += bias[start : start + step]
            lse = torch.logsumexp(scores, dim=-1)
            outs.append(torch.matmul(scores.sub_(lse.unsqueeze(-1)).exp_(), v.unsqueeze(1)))
            lses.append(lse)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def _hot_tokens(self, slots: HotSlots, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [rows, slots.tokens, head_dim] fp32."""
        if slots.only_page is not None:
            both = self.hot.select(0, slots.only_page)
        else:
            page_rows = self.hot.view(-1, self.page_size * self.head_dim)
            both = page_rows.index_select(0, slots.index)
            both = both.view(self.sides, rows, -1, self.head_dim)
        sides = both.narrow(2, 0, slots.tokens).float()
        return sides[0], sides[-1]

    def _sealed_tokens(self, pages: SealedPages) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [pages.rows, tokens, head_dim] fp32."""
        k = self._decoded(self.fmt.k, self.sealed_k, pages, self.params.k)
        if self.sides == 1:
            return k, k
        return k, self._decoded(self.fmt.v, self.sealed_v, pages, self.params.v)

    def _decoded(
        self, side: Side, sealed: torch.Tensor, pages: SealedPages, params: Params
    ) -> torch.Tensor:
        """[pages.rows, tokens, head_dim] fp32"""
        # Rows are by head, and some parameters are of heads.
        heads = self.num_kv_heads if params else 1
        picked = sealed.index_select(0, pages.index).view(
            pages.rows // heads, heads, -1, sealed.shape[1]
        )
        shape = PageShape(self.page_size, self.head_dim, self.dtype)
        x = side.codec().decode(side, picked.transpose(1, 2).flatten(0, 1), shape, params)
        x = x.unflatten(0, (pages.rows // heads, -1)).transpose(1, 2)
        # Torch's attention on CPUs gives wrong results for other strides.
        return x.reshape(pages.rows, -1, self.head_dim).contiguous()  # type: ignore[no-any-return]
