"""`write_hot` in plain torch; the same signature as the public operator."""

from __future__ import annotations

import torch


def write_hot(k: torch.Tensor, v: torch.Tensor, hot: torch.Tensor, slots: torch.Tensor) -> None:
    page_size = hot.shape[3]
    if slots.shape[0] == 1:  # one decoding sequence: two views and a copy
        slot = int(slots)
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            both = (k, v) if hot.shape[1] == 2 else (k,)
            torch.cat(both, out=hot.select(0, page).select(2, offset))
        return
    if slots.numel() and int(slots.min()) < 0:
        keep = slots >= 0
        k, v, slots = k[keep], v[keep], slots[keep]
    pages = slots.div(page_size, rounding_mode="floor")
    index = (pages, slots - pages * page_size)
    # [num_hot_pages, page_size, num_kv_heads, head_dim]: makes the two indices adjacent
    hot[:, 0].transpose(1, 2).index_put_(index, k)
    if hot.shape[1] == 2:
        hot[:, 1].transpose(1, 2).index_put_(index, v)
