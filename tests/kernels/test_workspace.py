"""What attention allocates for a step is what is left free for it."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from kvmesh.kernels.attention import AttentionBatch, Lengths, triton_attention
from kvmesh.kernels.attention.layer import LayerAttention
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.workspace import AttentionShape

MILLION = 2**20
HEAD_DIM, PAGE_SIZE = 128, 64
# Their parts fill what is held at a time.
SHORT = [(2**15 - 1, 1)] * 410 + [(2**15, 17000)]


def held_bytes(
    sequences: list[tuple[int, int]], num_heads: int, num_kv_heads: int, window: int | None = None
) -> int:
    """By the results of parts in a step of (tokens before, new tokens); no kernel runs."""
    counts = torch.tensor([new for _, new in sequences])
    lens = torch.tensor([old + new for old, new in sequences])
    tables = torch.zeros(len(sequences), MILLION // PAGE_SIZE + 1, dtype=torch.int32)
    starts = torch.tensor([0, *accumulate(counts.tolist())])
    batch = AttentionBatch(
        query_starts=starts.int(),
        seq_lens=lens.int(),
        rows=torch.arange(len(sequences), dtype=torch.int32),
        hot_tables=tables,
        sealed_tables=tables,
        page_size=PAGE_SIZE,
        sink_pages=0,
        recent_pages=0,
        max_query_len=int(counts.max()),
        max_seq_len=int(lens.max()),
        lengths=Lengths(starts.numpy(), lens.numpy()),
    )
    q = torch.empty(int(counts.sum()), num_heads, HEAD_DIM, dtype=torch.bfloat16)
    hot = torch.empty(1, 2, num_kv_heads, PAGE_SIZE, HEAD_DIM, dtype=torch.bfloat16)
    layer = LayerAttention(get_format("int8"), 1.0, sliding_window=window)
    layers = triton_attention._StepLayers.of(q, hot, batch, layer)
    held = {
        id(x): x.nbytes
        for launch in layers.step().launches
        for x in launch.fixed
        if isinstance(x, torch.Tensor)
    }
    return sum(held.values())


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (32, 8), (3, 3)])
def test_no_step_holds_more_than_is_left_free(num_heads: int, num_kv_heads: int) -> None:
    shape = AttentionShape(num_heads, num_kv_heads, HEAD_DIM, 2, MILLION, 20000)
    limit = shape.workspace_bytes(get_format("int8"), far=False)
    long = [(MILLION - 1, 1)] * 5
    chunk = [(MILLION - 300, 300)]
    steps = (long, chunk, chunk * 2, long + chunk, SHORT, SHORT[:-1] + chunk)
    held = [held_bytes(step, num_heads, num_kv_heads) for step in steps]
    assert max(held) <= limit <= 1.05 * max(held)


def test_layers_with_windows_hold_results_of_their_own() -> None:
    one = AttentionShape(32, 8, HEAD_DIM, 2, MILLION, 512)
    two = AttentionShape(32, 8, HEAD_DIM, 2, MILLION, 512, kinds=2)
    fmt = get_format("k4v4")
    held = held_bytes(SHORT, 32, 8) + held_bytes(SHORT, 32, 8, window=4096)
    assert one.workspace_bytes(fmt, far=False) < held < two.workspace_bytes(fmt, far=False)
