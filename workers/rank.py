"""One rank: its share of the model and of the pool, on one device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import torch

from kvmesh.kernels.attention import far_attention
from kvmesh.kernels.formats.base import KVFormat, ModelParams
from kvmesh.kernels.formats.registry import get_format
from kvmesh.kernels.gpu import LATENTS_FROM, Capability
from kvmesh.kernels.workspace import AttentionShape
from kvmesh.workers.calibration.file import Calibration
from kvmesh.workers.config import DEFAULT_CPU_KV_MEMORY_BYTES, EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.executor import Allocation, RankDescription
from kvmesh.workers.model.facts import read_facts, sample_digest
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import ServedModel, load_model
from kvmesh.workers.model.sizes import check_tp
from kvmesh.workers.model.source import ModelFiles, resolve_model
from kvmesh.workers.page_geometry import format_for
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.parallel.heads import merge_over_ranks
from kvmesh.workers.plan import StepPlan, StepResult
from kvmesh.workers.runner import SCORED_ROWS, ModelRunner
from kvmesh.workers.scoring.probe import code_versions, measure_divergences
from kvmesh.workers.scoring.probe_cache import ProbeCache
from kvmesh.workers.sizes import page_bytes_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of `rank`; Ray and CUDA_VISIBLE_DEVICES decide which GPUs a process sees.

    Raises ConfigError naming `device` if CUDA is requested but not available."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device", "is cuda, but this process sees no GPU; use cpu or auto")
    return torch.device("cuda", rank % torch.cuda.device_count())


def check_gpu(config: EngineConfig, fmt: KVFormat, capability: Capability) -> None:
    """Raises ConfigError for a format or a setting that a GPU of this compute capability, or any,
    cannot serve."""
    if config.cuda_graphs is True and not fmt.has_kernels:
        raise ConfigError(
            "cuda_graphs",
            "must be auto or false for this model: a graph cannot hold attention over latents, "
            "whose parts the host decides on in every step",
        )
    if fmt.values_in_keys and capability < LATENTS_FROM:
        needed, found = (".".join(map(str, each)) for each in (LATENTS_FROM, capability))
        raise ConfigError(
            "model",
            f"attention over latents needs a GPU of compute capability {needed} or newer, whose "
            f"processors have enough shared memory; this one has {found}",
        )


class Rank:
    """Loads the model on construction. Call `allocate` once, then `runner` computes steps.

    shared: a rank that has loaded the same model, whose weights are reused
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        comm: Communicator,
        shared: Rank | None = None,
    ) -> None:
        self._config = config
        self._rank = rank
        self._comm = comm
        self._device = choose_device(config, rank)
        self._memory_bytes = _memory_bytes(self._device)
        self._limits = config.limits(self._device.type, self._memory_bytes)
        self._dtype = _dtype(config, self._device)
        self._samples = rank == 0
        self._runner: ModelRunner | None = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(config.threads_per_rank or max(1, _cpus() // config.ranks))
        self._files: ModelFiles = (
            shared._files if shared else resolve_model(config.model, rope=config.rope)
        )
        self._fmt = format_for(config.kv_format, self._files.path)
        if self._device.type == "cuda":
            check_gpu(config, self._fmt, torch.cuda.get_device_capability(self._device))
        self._sink_pages = _default(config.sink_pages, self._fmt.sink_pages)
        self._recent_pages = _default(config.recent_pages, self._fmt.recent_pages)
        # Before the weights, so that a file that does not fit fails early.
        self._params = self._load_calibration()
        self._model: ServedModel = (
            shared._model
            if shared
            else load_model(
                self._files.path,
                dtype=self._dtype,
                device=self._device,
                comm=comm,
                rope=config.rope,
                max_model_len=config.max_model_len,
                expert_parallel=config.expert_parallel,
                weight_format=config.weight_format,
            )
        )
        if config.deterministic and shared is None:
            self._model.make_deterministic()
        if self._device.type == "cuda" and self._fmt.v.rotated and shared is None:
            self._model.rotate_values(True)  # saves two launches a layer

    def describe(self) -> RankDescription:
        facts, state = self._model.facts, self._model.state
        hot_bytes, sealed_bytes = page_bytes_of(
            self._fmt,
            num_layers=facts.num_kv_layers,
            num_kv_heads=self._model.num_kv_heads,
            page_size=self._config.page_size,
            head_dim=self._model.head_dim,
            dtype_bytes=self._dtype.itemsize,
        )
        return RankDescription(
            model=self._files.name,
            model_revision=self._files.revision,
            dtype=str(self._dtype).removeprefix("torch."),
            vocab_size=facts.num_token_ids,
            max_model_len=facts.max_model_len,
            eos_token_ids=facts.eos_token_ids,
            sink_pages=self._sink_pages,
            recent_pages=self._recent_pages,
            hot_page_bytes=hot_bytes,
            sealed_page_bytes=sealed_bytes,
            state_bytes=0 if state is None else state.num_bytes(self._dtype.itemsize),
            kv_budget_bytes=self._kv_budget_bytes(),
            head_dim=self._model.head_dim,
            device=self._device.type,
            gpu_uuid=_gpu_uuid(self._device),
            model_path=str(self._files.path),
            memory_bytes=self._memory_bytes,
            rope=facts.rope,
            kvp=self._comm.kvp,
            kv_format=self._fmt.name,
            values_in_keys=facts.values_in_keys,
            operators=self._operators(),
        )

    def allocate(self, allocation: Allocation, *, prepare_decode: bool = True) -> None:
        """prepare_decode: compile decode, and capture its CUDA graphs, before the first step"""
        self._runner = ModelRunner(
            self._model,
            self._fmt,
            allocation,
            self._comm,
            page_size=self._config.page_size,
            sink_pages=self._sink_pages,
            recent_pages=self._recent_pages,
            dtype=self._dtype,
            device=self._device,
            samples=self._samples,
            prepare_decode=prepare_decode,
            cuda_graphs=self._limits.cuda_graphs and self._fmt.has_kernels,
            params=self._params,
            deterministic=self._config.deterministic,
        )

    def commit_pool(self) -> None:
        """Take all of the pool's memory now; for measurements. Its contents are lost."""
        assert self._runner is not None, "allocate comes before commit_pool"
        self._runner.pool.commit()

    def execute(self, plan: StepPlan) -> StepResult | None:
        """See ModelRunner.execute."""
        return self.runner.execute(plan)

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "allocate comes before the first step"
        return self._runner

    @property
    def samples(self) -> bool:
        """Whether this rank answers."""
        return self._samples

    @property
    def runs_ahead(self) -> bool:
        """Whether a step that is launched is not computed yet."""
        return self._device.type == "cuda"

    def _load_calibration(self) -> ModelParams | None:
        """This rank's calibrated parameters of every layer, if the format needs them."""
        if self._config.calibration is None:
            return None
        facts = read_facts(self._files.path, self._config.rope)
        tp, kvp = self._comm.tp, self._comm.kvp
        check_tp(facts, tp, kvp, expert_parallel=self._config.expert_parallel)
        found = Calibration.load(
            Path(self._config.calibration), self._fmt, facts, self._config.model, self._sink_pages
        )
        return found.for_rank(self._fmt, self._comm.tp_rank, tp, self._device)

    def score(self, plan: StepPlan) -> torch.Tensor | None:
        """Logits of all the plan's tokens, see ModelRunner.score."""
        assert self._runner is not None, "allocate comes before score"
        return self._runner.score(plan)

    def divergences(self, kv_formats: list[str]) -> list[float]:
        """See Executor.divergences; the result on rank 0, [] on the other ranks."""
        cache = ProbeCache(self._probe_inputs(kv_formats))
        found = cache.load() if self._rank == 0 else None
        # Rank 0 decides for all ranks, because they measure together.
        is_found = torch.tensor([float(found is not None)], device=self._device)
        if self._comm.all_reduce(is_found):
            return found or []
        kl_nats = measure_divergences(
            self,
            self._files.path,
            kv_formats,
            page_size=self._config.page_size,
            max_tokens=self._model.facts.max_model_len,
        )
        if self._rank == 0:
            cache.store(kl_nats)
        return kl_nats

    def _probe_inputs(self, kv_formats: list[str]) -> tuple[object, ...]:
        """Everything that the probe's result depends on."""
        config = self._config
        cuda = self._device.type == "cuda"
        return (
            self._files.revision,
            kv_formats,
            config.page_size,
            (config.rope, config.max_model_len),  # the length decides between LongRoPE's factors
            (config.sink_pages, config.recent_pages),
            None if config.calibration is None else sample_digest(Path(config.calibration)),
            (config.tp, config.kvp),
            self._dtype,
            config.weight_format,
            torch.cuda.get_device_name(self._device) if cuda else "cpu",
            code_versions(),
        )

    def with_format(self, kv_format: str, calibration: str | None = None) -> Self:
        """A rank with the same model and weights, another KV format, and no pool yet.

        calibration: file for that format; by default this rank's file if the format is its own
        """
        if calibration is None and get_format(kv_format).name == self._fmt.name:
            calibration = self._config.calibration
        config = self._config.replace(kv_format=kv_format, calibration=calibration)
        return type(self)(config, self._rank, self._comm, shared=self)

    def _kv_budget_bytes(self) -> int:
        """Memory for KV on this rank: the setting, or what a GPU has left after the weights and
        the largest step's activations."""
        if self._config.kv_memory_bytes is not None:
            return self._config.kv_memory_bytes
        if self._device.type == "cpu":
            return DEFAULT_CPU_KV_MEMORY_BYTES
        # Before the first collective: the others may read their weights from a slower disk.
        self._comm.wait_for_all()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        held = torch.cuda.memory_allocated(self._device)
        self._dry_run()
        activations = torch.cuda.max_memory_allocated(self._device) - held
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free - activations - (1 - self._config.gpu_memory_utilization) * total)

    @torch.inference_mode()
    def _dry_run(self) -> None:
        """The largest step without attention, and the results of attention's parts."""
        limits = self._limits
        tokens = torch.zeros(limits.max_num_batched_tokens, dtype=torch.int64, device=self._device)
        num_rows = max(limits.max_num_seqs, SCORED_ROWS)
        rows = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        _parts = torch.empty(self._attention_bytes(), dtype=torch.uint8, device=self._device)
        logits = self._model.forward(tokens, tokens, self._attend_to_nothing, rows)
        if logits is not None:
            torch.log_softmax(logits, dim=-1)

    def _attention_bytes(self) -> int:
        """What a layer's attention allocates at most."""
        model = self._model
        shape = AttentionShape(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype_bytes=self._dtype.itemsize,
            max_seq_len=model.facts.max_model_len,
            max_queries=self._limits.max_num_batched_tokens,
            kinds=len(set(model.facts.sliding_windows)),
        )
        return shape.workspace_bytes(self._fmt, far=self._far_attention is not None)

    def _operators(self) -> str:
        """What was chosen at load, as users read it."""
        chosen = {"far keys": self._far_attention, "sums": self._comm.sums_with}
        return ", ".join(f"{what}: {name}" for what, name in chosen.items() if name)

    @property
    def _far_attention(self) -> str | None:
        """What large chunks attend to far keys with, if any layer has such keys."""
        model = self._model
        facts = model.facts
        if self._config.deterministic or facts.values_in_keys or None not in facts.sliding_windows:
            return None
        group = model.num_heads // model.num_kv_heads
        return far_attention(self._device, self._dtype, group, model.head_dim)

    def _attend_to_nothing(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttendArgs
    ) -> torch.Tensor:
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        if self._comm.kvp == 1:
            return out
        lse = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
        return merge_over_ranks(out, lse, self._comm)[0]


def _gpu_uuid(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _memory_bytes(device: torch.device) -> int:
    """All that a GPU has; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[config.dtype]


def _default(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
