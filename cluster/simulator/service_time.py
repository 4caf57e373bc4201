"""How long an engine's step takes, and what its pool holds.

A step computes chunks of prompts and one token for each decoding sequence:

    linear     max(2 · params · tokens / flops, weight bytes / bandwidth)
    attention  prompts: 4 · layers · heads · head_dim · Σ new·(context + new/2) / flops
               decoding: KV bytes of all contexts / bandwidth
    overhead   a constant

each with the share of the data sheet that serving reaches (see `Gpu`), and times a
group's GPUs, less a share lost to communication. KV bytes are the format's, so a
low-bit format reads less; the cost of unpacking is a lower bandwidth share
(`KV_READ_SHARE`).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.routing.pace import Pace
from kvmesh.cluster.simulator.hardware import Gpu, ModelShape
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.workers.page_geometry import geometry_of
from kvmesh.workers.pool_plan import PoolPlan, plan_pool
from kvmesh.workers.sizes import PageGeometry

BF16_BYTES = 2
# Low-bit kernels are limited by unpacking instructions rather than by memory bandwidth.
KV_READ_SHARE = {16: 1.0, 8: 0.9, 4: 0.65, 2: 0.5}
SCALING_EFFICIENCY = 0.9  # share that remains at each doubling of a group's GPUs


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The hardware, model and configuration of one group.

    gpus: of the group; page_size in tokens
    memory_share: of a GPU's memory that weights and KV may take
    max_step_s: of a step while sequences decode, by smaller chunks of prompts; None: no limit
    """

    gpu: Gpu
    model: ModelShape
    kv_format: KVFormat
    gpus: int = 1
    page_size: int = 64
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    memory_share: float = 0.9
    max_step_s: float | None = 0.1

    @property
    def geometry(self) -> PageGeometry:
        """Over all GPUs of the group, as one rank."""
        return geometry_of(
            self.kv_format, self.model.kv, page_size=self.page_size, itemsize=BF16_BYTES
        )

    @property
    def pool(self) -> PoolPlan:
        """Pages as the engine itself would divide its memory. Raises ConfigError if none fit."""
        memory = int(self.gpu.memory_bytes * self.memory_share * self.gpus)
        weights = int((self.model.params + self.model.idle_params) * BF16_BYTES)
        return plan_pool(
            memory - weights,
            self.geometry,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """Seconds of a step, from coefficients that an EngineShape implies or that were fitted.

    weights_s: reading the weights once; token_s: a token through the linear layers
    pair_s: a (query, key) pair of a prompt; kv_s: a token of context read to decode
    step_s: overhead
    """

    weights_s: float
    token_s: float
    pair_s: float
    kv_s: float
    step_s: float

    @classmethod
    def of(cls, shape: EngineShape) -> ServiceTime:
        gpu, model = shape.gpu, shape.model
        doublings = shape.gpus.bit_length() - 1
        power = shape.gpus * SCALING_EFFICIENCY**doublings
        bandwidth = gpu.bandwidth * gpu.bandwidth_share * power
        kv_bits = min(KV_READ_SHARE, key=lambda bits: abs(bits - shape.kv_format.k_bits))
        kv_bytes = shape.geometry.sealed_page_bytes / shape.page_size
        pair_flops = 4 * model.layers * model.heads * model.head_dim
        return cls(
            weights_s=model.params * BF16_BYTES / bandwidth,
            token_s=2 * model.params / (gpu.flops * gpu.prefill_share * power),
            pair_s=pair_flops / (gpu.flops * gpu.attention_share * power),
            kv_s=kv_bytes / (bandwidth * KV_READ_SHARE[kv_bits]),
            step_s=gpu.step_s,
        )

    def step(self, new_tokens: int, pairs: float, decoding: int, context_tokens: int) -> float:
        """A step with `new_tokens` of prompts over `pairs`, and `decoding` sequences.

        context_tokens: of the decoding sequences, together
        """
        linear = max(self.weights_s, (new_tokens + decoding) * self.token_s)
        return self.step_s + linear + pairs * self.pair_s + context_tokens * self.kv_s

    def alone(self, prompt_tokens: int, chunk_tokens: int) -> float:
        """Time to the first token of a prompt on an idle engine."""
        chunks, rest = divmod(prompt_tokens, chunk_tokens)
        pairs = 0.5 * prompt_tokens * prompt_tokens
        last = self.step(rest, 0.0, 0, 0) if rest else 0.0
        return chunks * self.step(chunk_tokens, 0.0, 0, 0) + last + pairs * self.pair_s

    def pace(self, chunk_tokens: int) -> Pace:
        """The initial pace that a router would be configured with for such an engine."""
        return Pace(
            prefill_s_per_token=self.step(chunk_tokens, 0.0, 0, 0) / chunk_tokens,
            prefill_s_per_pair=self.pair_s,
            decode_step_s=self.step_s + 1.5 * self.weights_s,
        )
