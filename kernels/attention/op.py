"""The public operator `paged_attention`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache

import torch

from kvmesh.kernels import gpu
from kvmesh.kernels.attention import dense, reference
from kvmesh.kernels.attention.batch import AttentionBatch
from kvmesh.kernels.attention.layer import LayerAttention
from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams
from kvmesh.kernels.formats.registry import get_format

# Rows of queries and scores that stay in the cache next to a page.
CPU_SHARED_ROWS = 64

Result = tuple[torch.Tensor, torch.Tensor]


def paged_attention(
    q: torch.Tensor,
    hot: torch.Tensor,
    sealed: torch.Tensor,
    batch: AttentionBatch,
    *,
    fmt: KVFormat,
    scale: float,
    params: LayerParams = NO_PARAMS,
    softcap: float | None = None,
    sliding_window: int | None = None,
    backend: str | None = None,
) -> Result:
    """Causal attention of new query tokens over hot and sealed pages of one layer.

    q: [num_tokens, num_heads, head_dim] bf16 or fp32; query head h reads KV head
        h // (num_heads / num_kv_heads)
    hot: [num_hot_pages, 2, num_kv_heads, page_size, head_dim], dtype of q;
        already holds the new tokens' keys and values (`write_hot`). If the format's values
        are in keys, the second dimension is 1, and values are the first channels of keys
    sealed: [num_sealed_pages, num_kv_heads, page_bytes] uint8 in format `fmt`
    batch: the step's sequences and tables
    params: this layer's calibrated parameters, if the format needs them
    scale: factor of q·k; softcap c: scores become c * tanh(score / c)
    sliding_window w: key j is visible to query i if i - j < w; with w < 0, attention in chunks of
        -w tokens, if j // -w == i // -w
    backend: None picks "triton" on GPUs, and on CPUs "numba" or, for formats without
        compiled loops, "reference" (plain torch). For "triton", plain torch decodes the pages of
        formats for comparison
    Returns out: like q, or with as many channels as values have; lse: [num_tokens, num_heads]
    fp32, natural log, mergeable with `merge_states`. Rows of q that belong to no sequence get 0
    and -inf.
    Raises ValueError naming the argument. A page that is missing in the form a query
    reads is an error on CPUs and is not detected on GPUs.
    """
    if q.dim() != 3 or hot.dim() != 5 or hot.shape[4] != q.shape[2] or hot.dtype != q.dtype:
        raise ValueError(
            "q, hot: expected [num_tokens, num_heads, head_dim] and [num_hot_pages, 2, "
            "num_kv_heads, page_size, head_dim] of one dtype, "
            f"got {tuple(q.shape)} {q.dtype} and {tuple(hot.shape)} {hot.dtype}"
        )
    if hot.shape[1] != fmt.stored_sides:
        raise ValueError(
            f"hot: expected a second dimension of {fmt.stored_sides} for format {fmt.name} with "
            f"values {'in' if fmt.values_in_keys else 'besides'} keys, got {tuple(hot.shape)}"
        )
    num_kv_heads, page_size, head_dim = hot.shape[2:]
    if q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q: the number of heads must be a multiple of {num_kv_heads} (num_kv_heads of hot), "
            f"got {q.shape[1]}"
        )
    if batch.page_size != page_size:
        raise ValueError(f"batch: expected page_size {page_size} as in hot, got {batch.page_size}")
    page_bytes = fmt.page_bytes(page_size, head_dim, hot.element_size())
    if sealed.dtype != torch.uint8 or sealed.shape[1:] != (num_kv_heads, page_bytes):
        raise ValueError(
            f"sealed: expected [num_sealed_pages, {num_kv_heads}, {page_bytes}] uint8 for format "
            f"{fmt.name}, got {tuple(sealed.shape)} {sealed.dtype}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected None or a number > 0, got {softcap}")
    if sliding_window == 0:
        raise ValueError("sliding_window: expected None, >= 1 or, for chunks, <= -1, got 0")
    layer = LayerAttention(fmt, scale, params, softcap, sliding_window)
    return _implementation(fmt, hot, backend)(q, hot, sealed, batch, layer)


def sharers(fmt: KVFormat, hot: torch.Tensor, num_heads: int) -> tuple[int, int]:
    """Minimum worthwhile and maximum number of sequences in a set of `SharedPrefixes`.

    hot: as in `paged_attention`; num_heads: query heads
    """
    if not gpu.runs_kernels(hot):
        return 2, max(2, CPU_SHARED_ROWS // (num_heads // hot.shape[2]))
    from kvmesh.kernels.attention import triton_form, triton_launch

    if not fmt.has_kernels:  # pages are decoded for each sequence
        return 2, 2
    geometry = triton_form.Geometry.of(hot, num_heads)
    return triton_launch.sharers(fmt, geometry, gpu.gpu_of(hot).capability)


def far_attention(
    device: torch.device, dtype: torch.dtype, group: int, head_dim: int
) -> str | None:
    """What large chunks of prompts attend to far keys with (`far.py`), as users read it; None for
    the kernels that attend to all others. group: query heads per KV head"""
    if device.type == "cpu":
        return None
    found = dense.dense_attention(device, dtype, group, head_dim)
    return None if found is None else found.name


def can_be_deterministic(fmt: KVFormat, hot: torch.Tensor) -> bool:
    """Whether the kernels or loops that a deterministic batch needs exist; fmt, hot: as in
    `paged_attention`."""
    if gpu.runs_kernels(hot):
        return fmt.has_kernels
    return _cpu_backend(fmt, *hot.shape[3:], hot.dtype) == "numba"


def warm_up_far(hot: torch.Tensor, num_heads: int, *, fmt: KVFormat) -> None:
    """Compile what far keys need, before the first request; hot, fmt: as in `paged_attention`."""
    from kvmesh.kernels.attention import triton_far

    num_kv_heads, _, head_dim = hot.shape[2:]
    found = dense.dense_attention(hot.device, hot.dtype, num_heads // num_kv_heads, head_dim)
    if found is not None and not fmt.values_in_keys:
        # Pages of other formats are decoded into exact ones.
        fmt = get_format("exact") if fmt.comparison else fmt
        triton_far.warm_up(hot, num_heads, fmt, found)


def _implementation(fmt: KVFormat, hot: torch.Tensor, backend: str | None) -> Callable[..., Result]:
    if backend is None:
        backend = (
            "triton" if gpu.runs_kernels(hot) else _cpu_backend(fmt, *hot.shape[3:], hot.dtype)
        )
    if backend == "reference":
        return reference.paged_attention
    # Imported here: a machine with a GPU may lack Numba, and one without may lack Triton.
    if backend == "numba":
        from kvmesh.kernels.attention import numba_attention

        return numba_attention.paged_attention
    if backend == "triton" and fmt.values_in_keys:
        from kvmesh.kernels.attention import latent

        return latent.paged_attention
    if backend == "triton" and fmt.comparison:
        from kvmesh.kernels.attention import decoded

        return decoded.paged_attention
    if backend == "triton":
        from kvmesh.kernels.attention import triton_attention

        return triton_attention.paged_attention
    raise ValueError(f"backend: expected None, 'numba', 'triton' or 'reference', got {backend!r}")


@cache
def _cpu_backend(fmt: KVFormat, page_size: int, head_dim: int, dtype: torch.dtype) -> str:
    """Compiled loops if Numba is installed and the format has them, otherwise plain torch."""
    if importlib.util.find_spec("numba") is None:
        return "reference"
    from kvmesh.kernels.attention import numba_attention

    compiled = numba_attention.has_loop(fmt, page_size, head_dim, dtype)
    return "numba" if compiled else "reference"
