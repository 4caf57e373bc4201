"""What an engine is asked to be. Torch-free: the control plane builds these."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.pool_plan import DEFAULT_MAX_HOT_SHARE

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
KV_PROBES = ("off", "warn", "refuse")
PAGE_SIZES = (16, 32, 64, 128, 256)
DEFAULT_CPU_KV_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One group: a model, its KV format and layout, and its limits.

    model: a name, a Hugging Face directory or a GGUF file (workers/model/source.py)
    kv_format: how sealed pages are encoded (kernels/formats/registry.py)
    calibration: file of `kvmesh calibrate`, for the formats that need one
    page_size: tokens a page
    sink_pages, recent_pages: windows read exactly; None takes the format's own
    dtype: of weights, activations and hot pages; auto is bfloat16 on GPUs, float32 on CPUs
    device: auto takes GPUs where there are any
    tp: ranks the heads are split over; divides the model's KV heads
    kv_memory_bytes: of KV a rank; None takes what a GPU has free, or 1 GiB on a CPU
    gpu_memory_utilization: share of a GPU that weights, activations and KV may fill
    max_num_seqs: sequences running at once
    max_hot_share: of the KV memory, what exact pages may take; where it is too little for
        max_num_seqs, fewer run. More than half is for short sequences in formats with windows
    max_num_batched_tokens: tokens a step computes; longer prompts are chunked
    max_model_len: tokens a sequence may have; None takes the model's own
    prefix_cache: keep sealed pages of ended sequences and share them
    threads_per_rank: CPU threads of a rank; None shares the machine's among the ranks
    cuda_graphs: replay decode steps from CUDA graphs; has no effect on CPUs
    kv_probe: at load, measure what the KV format does to the model, and where it hurts
        warn or refuse; or off
    """

    model: str
    kv_format: str = "int8"
    calibration: str | None = None
    page_size: int = 64
    sink_pages: int | None = None
    recent_pages: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    tp: int = 1
    kv_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 16
    max_hot_share: float = DEFAULT_MAX_HOT_SHARE
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    prefix_cache: bool = True
    threads_per_rank: int | None = None
    cuda_graphs: bool = False
    kv_probe: str = "warn"

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", "must name a model, a directory or a GGUF file")
        _check_calibration(self.model, self.kv_format, self.calibration)
        if self.page_size not in PAGE_SIZES:
            raise ConfigError(
                "page_size",
                f"must be one of {', '.join(map(str, PAGE_SIZES))}; got {self.page_size}",
            )
        _choice("dtype", self.dtype, DTYPES)
        _choice("device", self.device, DEVICES)
        _choice("kv_probe", self.kv_probe, KV_PROBES)
        for name in ("tp", "max_num_seqs", "max_num_batched_tokens"):
            _at_least(name, getattr(self, name), 1)
        for name in ("kv_memory_bytes", "max_model_len", "threads_per_rank"):
            _at_least(name, getattr(self, name), 1)
        for name in ("sink_pages", "recent_pages"):
            _at_least(name, getattr(self, name), 0)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                "gpu_memory_utilization",
                f"must be over 0 and at most 1, got {self.gpu_memory_utilization}",
            )
        if not 0.0 < self.max_hot_share < 1.0:
            raise ConfigError(
                "max_hot_share", f"must be over 0 and under 1, got {self.max_hot_share}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}), so that every running "
                f"sequence can decode in every step; got {self.max_num_batched_tokens}",
            )


def _check_calibration(model: str, kv_format: str, calibration: str | None) -> None:
    try:
        fmt = get_format(kv_format)
    except ValueError as error:
        raise ConfigError("kv_format", str(error)) from None
    if fmt.needs_calibration and calibration is None:
        raise ConfigError(
            "calibration",
            f"{fmt.name} needs a calibration file; make one with: "
            + calibrate_command(model, fmt.name),
        )
    if calibration is not None and not fmt.needs_calibration:
        raise ConfigError("calibration", f"{fmt.name} needs none, got {calibration}")


def calibrate_command(model: str, kv_format: str) -> str:
    """What makes the calibration file of a model and format."""
    return (
        f"kvmesh calibrate --model {model} --kv-format {kv_format} "
        f"--text TEXT --output {kv_format}.safetensors"
    )


def _choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(field, f"must be one of {', '.join(choices)}; got {value!r}")


def _at_least(field: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(field, f"must be at least {least}, got {value}")
