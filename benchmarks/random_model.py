"""Models of a given shape with random weights, generated where they run, without a download.

The cost of a step does not depend on the values of the weights. The model is the one used in
serving (workers/model/load.py), and its rank runs the same code as any rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.linear import GroupedWeight, Kind
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription
from kvmesh.workers.model.facts import ModelFacts
from kvmesh.workers.model.load import ServedModel, build_model
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.rank_steps import RankSteps
from kvmesh.workers.runner import ModelRunner
from kvmesh.workers.sizes import page_bytes_of


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama model."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    max_model_len: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            max_position_embeddings=self.max_model_len,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
        )

    def facts(self, dtype: torch.dtype) -> ModelFacts:
        return ModelFacts(
            name=self.name,
            revision="random",
            architecture="LlamaForCausalLM",
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden,
            mlp_sizes=(self.intermediate,),
            vocab_size=self.vocab,
            max_model_len=self.max_model_len,
            eos_token_ids=(),
            weight_bytes=self.params * dtype.itemsize,
            dtype=str(dtype).removeprefix("torch."),
            sliding_windows=(None,) * self.layers,
        )

    @property
    def params(self) -> int:
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + (2 * self.vocab + 1) * self.hidden

    @property
    def params_read(self) -> int:
        """Parameters that a decode step reads: only a few rows of the embeddings."""
        return self.params - self.vocab * self.hidden


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3-8b", 32, 32, 8, 128, 4096, 14336, 128256, 2**20 + 1024),
        ModelShape("tiny", 2, 4, 2, 64, 64, 128, 128, 4096),
    )
}


class RandomWeights:
    """Tensors of any name: ones for norms, otherwise N(0, 0.02²), like Llama's initialisation."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype = dtype
        self.keeps_bits = False
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __contains__(self, name: str) -> bool:
        return True

    def whole(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self.dtype
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)
        weight = torch.empty(shape, dtype=dtype, device=self._device)
        return weight.normal_(0.0, 0.02, generator=self._generator)

    def rows(self, name: str, shape: torch.Size, first: int, end: int) -> torch.Tensor:
        return self.whole(name, torch.Size((end - first, *shape[1:])))

    def columns(self, name: str, shape: torch.Size, first: int, end: int) -> torch.Tensor:
        return self.whole(name, torch.Size((shape[0], end - first)))

    def part(self, name: str, shape: torch.Size, *index: slice) -> torch.Tensor:
        sizes = [len(range(*at.indices(size))) for at, size in zip(index, shape, strict=False)]
        return self.whole(name, torch.Size((*sizes, *shape[len(index) :])))

    def kept(self, name: str, shape: torch.Size) -> None:
        """None: none is quantised."""

    def leave(self, name: str, shape: torch.Size) -> None:
        """Does nothing: every tensor exists."""

    def check_all_read(self) -> None:
        """Does nothing: every tensor exists."""


KINDS: tuple[Kind, ...] = ("uint4", "uint8", "e4m3", "e2m1")


def random_grouped(
    kind: Kind, num_outputs: int, num_inputs: int, *, experts: int | None = None
) -> GroupedWeight:
    """A weight of random codes on the CPU, coded as checkpoints are that have this kind most often:
    in groups of 128, or 32 of e2m1, with zeros of uint4 alone."""
    leading = () if experts is None else (experts,)
    rows = num_inputs if kind in ("uint8", "e4m3") else -(-num_inputs // 32) * 16
    group = 32 if kind == "e2m1" else 128
    codes = torch.randint(0, 256, (*leading, rows, num_outputs), dtype=torch.uint8)
    if kind == "e4m3":
        codes &= 0xF7  # no NaN
    shape = (*leading, -(-num_inputs // group), num_outputs)
    scales = (torch.rand(shape) + 0.5).div_(100).bfloat16()
    if kind == "e2m1":
        scales = torch.randint(118, 122, shape, dtype=torch.uint8)
    zeros = torch.randint(1, 16, shape, dtype=torch.uint8) if kind == "uint4" else None
    return GroupedWeight(kind, codes, scales, zeros, group, None, num_inputs)


def random_model(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, kv_format: str = "exact"
) -> ServedModel:
    """kv_format: that the model is served in, whose rotation of values is folded into weights"""
    model = build_model(
        shape.facts(dtype),
        shape.config(),
        RandomWeights(dtype, device),
        dtype=dtype,
        device=device,
        comm=Communicator.single(),
    )
    model.rotate_values(get_format(kv_format).v.rotated)
    return model


class RandomModelExecutor:
    """The single rank of a group, over a model that already exists."""

    num_ranks = 1

    def __init__(
        self,
        model: ServedModel,
        config: EngineConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert config.kv_memory_bytes is not None
        self._model = model
        self._config = config
        self.dtype = dtype
        self._device = device
        self._fmt = get_format(config.kv_format)
        self._runner: ModelRunner | None = None
        self.max_in_flight = 2 if device.type == "cuda" else 1

    def describe(self) -> list[RankDescription]:
        facts, config, fmt = self._model.facts, self._config, self._fmt
        hot_bytes, sealed_bytes = page_bytes_of(
            fmt,
            num_layers=facts.num_layers,
            num_kv_heads=self._model.num_kv_heads,
            page_size=config.page_size,
            head_dim=facts.head_dim,
            dtype_bytes=self.dtype.itemsize,
        )
        assert config.kv_memory_bytes is not None
        return [
            RankDescription(
                model=facts.name,
                model_revision=facts.revision,
                dtype=facts.dtype,
                vocab_size=facts.vocab_size,
                max_model_len=facts.max_model_len,
                eos_token_ids=facts.eos_token_ids,
                sink_pages=fmt.sink_pages if config.sink_pages is None else config.sink_pages,
                recent_pages=(
                    fmt.recent_pages if config.recent_pages is None else config.recent_pages
                ),
                hot_page_bytes=hot_bytes,
                sealed_page_bytes=sealed_bytes,
                kv_budget_bytes=config.kv_memory_bytes,
                head_dim=facts.head_dim,
            )
        ]

    def divergences(self, kv_formats: list[str]) -> list[float]:
        raise NotImplementedError("a model with random weights cannot be probed with a text")

    def allocate(self, allocation: Allocation) -> None:
        (description,) = self.describe()
        self._model.rotate_values(self._fmt.v.rotated)
        self._runner = ModelRunner(
            self._model,
            self._fmt,
            allocation,
            Communicator.single(),
            page_size=self._config.page_size,
            sink_pages=description.sink_pages,
            recent_pages=description.recent_pages,
            dtype=self.dtype,
            device=self._device,
            samples=True,
            cuda_graphs=self._config.limits(self._device.type).cuda_graphs,
        )
        self._steps = RankSteps(self._runner, samples=True)

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "call allocate first"
        return self._runner

    def submit(self, plan: StepPlan) -> None:
        self._steps.submit(plan)

    def result(self, masks: MakeMasks | None = None) -> StepResult:
        if masks is not None:
            self._steps.mask(masks())
        result = self._steps.result()
        assert result is not None
        return result

    def close(self) -> None:
        """Does nothing: there is nothing to close."""


def dtype_on(device: Any) -> torch.dtype:
    """Like the engine's `auto`."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
