"""What fills a GPU's memory besides KV, before any model is loaded.

    | gpu_memory_utilization · total                                     | left free |
    | driver, context | weights | activations | attention | KV budget    |

The engine measures activations and what the driver takes; here they are estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.planner.layout import Layout
from kvmesh.cluster.planner.model import PlannedModel
from kvmesh.cluster.simulator.hardware import Gpu
from kvmesh.cluster.simulator.service_time import BF16_BYTES
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_of_model
from kvmesh.kernels.workspace import DECODED_WEIGHT_BYTES, AttentionShape
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.weight_coding import StoredWeights
from kvmesh.workers.sizes import kv_heads_of_rank

# What the driver, CUDA's context, compiled kernels and NCCL's buffers take: NVML counts 0.5 to
# 0.9 GiB more than CUDA has, and a process with NCCL takes as much again.
CONTEXT_BYTES = 3 << 29
# Rows of logits of the largest step that are computed at once, see workers/runner.py.
LOGITS_ROWS = 128
FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one GPU.

    workspace_bytes: what attention allocates, as the engine counts it
    kv_bytes: the KV budget, below 0 if even the weights do not fit
    """

    total_bytes: int
    free_bytes: int
    context_bytes: int
    weight_bytes: int
    activation_bytes: int
    workspace_bytes: int

    @property
    def step_bytes(self) -> int:
        return self.activation_bytes + self.workspace_bytes

    @property
    def kv_bytes(self) -> int:
        taken = self.free_bytes + self.context_bytes + self.weight_bytes + self.step_bytes
        return self.total_bytes - taken


def rank_memory(
    gpu: Gpu,
    model: PlannedModel,
    layout: Layout,
    fmt: KVFormat,
    *,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    gpu_memory_utilization: float,
    weight_format: str = "exact",
) -> RankMemory:
    """Of the rank that has most; the settings as in `engine`."""
    activations = activation_bytes(
        model.sizes, layout.tp, max_num_batched_tokens, max_num_seqs, kvp=layout.kvp
    )
    if StoredWeights.of(weight_format, model.config).is_coded:
        activations += DECODED_WEIGHT_BYTES
    return RankMemory(
        total_bytes=gpu.nvml_bytes,
        free_bytes=round((1.0 - gpu_memory_utilization) * gpu.nvml_bytes),
        context_bytes=CONTEXT_BYTES,
        weight_bytes=model.weight_bytes(weight_format, layout.tp, layout.kvp),
        activation_bytes=activations,
        workspace_bytes=_workspace_bytes(
            model.sizes, layout, fmt, max_model_len, max_num_batched_tokens
        ),
    )


def _workspace_bytes(
    sizes: ModelSizes, layout: Layout, fmt: KVFormat, max_model_len: int, tokens: int
) -> int:
    """With an operator for far keys, as engines find one on GPUs from sm_80 on."""
    shape = AttentionShape(
        num_heads=sizes.heads // layout.tp,
        num_kv_heads=kv_heads_of_rank(sizes.kv_heads, layout.tp),
        head_dim=sizes.head_dim,
        dtype_bytes=BF16_BYTES,
        max_seq_len=max_model_len,
        max_queries=tokens,
        kinds=sizes.window_kinds,
    )
    stored = format_of_model(fmt, sizes.values_in_keys)
    return shape.workspace_bytes(stored, far=sizes.has_full_attention and not sizes.values_in_keys)


def activation_bytes(
    sizes: ModelSizes,
    tp: int,
    tokens: int,
    max_num_seqs: int,
    dtype_bytes: int = BF16_BYTES,
    *,
    kvp: int = 1,
) -> int:
    """An upper bound of what the largest step allocates besides weights and pages.

    Either in a layer, for all of its tokens, or for the rows of logits: in the compute dtype and
    twice in fp32, as they are scored.
    """
    hidden = sizes.hidden_size
    q = sizes.heads * sizes.head_dim // tp
    kv = kv_heads_of_rank(sizes.kv_heads, tp) * sizes.head_dim
    # Residual, normed input, projections; queries and keys before, during and after RoPE; output.
    attention = 3 * hidden + (q + 2 * kv) + 3 * (q + kv) + 2 * q
    if kvp > 1:  # what ranks exchange: in fp32, packed, in order, received, in parts, merged
        attention += 6 * q * FP32_BYTES // dtype_bytes
    width = max(
        sizes.intermediate_size if sizes.expert_layers < sizes.layers else 0,
        # Tokens are copied once for each of their experts.
        sizes.experts_per_token * (sizes.moe_intermediate_size + hidden)
        if sizes.expert_layers
        else 0,
    )
    # Residual, normed input, output; gate, up, activation and their product.
    mlp = 3 * hidden + 4 * -(-width // (tp * kvp))
    # Cosine and sine of each position; sums are exchanged in fp32.
    common = 4 * sizes.head_dim * FP32_BYTES + hidden * FP32_BYTES
    layer = tokens * (max(attention, mlp) * dtype_bytes + common)
    rows = max(max_num_seqs, LOGITS_ROWS)
    logits = rows * sizes.vocab_size * (2 * dtype_bytes + 2 * FP32_BYTES)
    return max(layer, tokens * hidden * dtype_bytes + logits)
