"""The settings of an engine, each in one place. Torch-free: the control plane builds these.

The control plane nests `EngineSettings` in its YAML; an engine is built from an
`EngineConfig`, which is those settings and the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.workers.byte_size import Bytes
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.pool_plan import DEFAULT_MAX_HOT_SHARE

PAGE_SIZES = (16, 32, 64, 128, 256)
DEFAULT_CPU_KV_MEMORY_BYTES = 1 << 30

_PAGE_SIZE_LIST = ", ".join(map(str, PAGE_SIZES))


def _known_format(name: str) -> str:
    """A KV format's name; the registry's own error lists those there are."""
    get_format(name)
    return name


def _known_page_size(page_size: int) -> int:
    if page_size not in PAGE_SIZES:
        raise ValueError(f"must be one of {_PAGE_SIZE_LIST}")
    return page_size


FormatName = Annotated[str, AfterValidator(_known_format)]
PageSize = Annotated[int, AfterValidator(_known_page_size)]


class Settings(BaseModel):
    """Frozen settings: unknown names are refused, defaults are checked like any other value."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class EngineSettings(Settings):
    """One group's engine."""

    kv_format: FormatName = Field(
        default="int8", description=f"How sealed KV pages are encoded: {', '.join(format_names())}"
    )
    calibration: str | None = Field(
        default=None,
        description="File of `kvmesh calibrate`, the same on every node; for formats that need one",
    )
    page_size: PageSize = Field(default=64, description=f"Tokens a page: one of {_PAGE_SIZE_LIST}")
    sink_pages: int | None = Field(
        default=None, ge=0, description="First pages always read exactly; null: the format's own"
    )
    recent_pages: int | None = Field(
        default=None, ge=0, description="Latest pages read exactly; null: the format's own"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute dtype; auto: bfloat16 on GPUs, float32 on CPUs"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: GPUs where there are any"
    )
    tp: int = Field(
        default=1, ge=1, description="Ranks the heads are split over; divides the KV heads"
    )
    kv_memory_bytes: Bytes | None = Field(
        default=None,
        description="KV memory of one rank, e.g. 512MiB; "
        "null: what the GPU has free, or 1 GiB on CPUs",
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of a GPU that weights, activations and KV may fill",
    )
    max_num_seqs: int = Field(default=16, ge=1, description="Sequences that run at once")
    max_hot_share: float = Field(
        default=DEFAULT_MAX_HOT_SHARE,
        gt=0,
        lt=1,
        description="Share of the KV memory that exact pages may take; more than half is for "
        "short sequences in formats with exact windows",
    )
    max_num_batched_tokens: int = Field(
        default=512, ge=1, description="Tokens a step computes; longer prompts are chunked"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Tokens a sequence may have; null: the model's own limit"
    )
    prefix_cache: bool = Field(default=True, description="Share sealed pages of equal prefixes")
    threads_per_rank: int | None = Field(
        default=None, ge=1, description="CPU threads of a rank; null: the machine's, shared"
    )
    cuda_graphs: bool = Field(
        default=False, description="Replay decode steps from CUDA graphs; no effect on CPUs"
    )
    kv_probe: Literal["off", "warn", "refuse"] = Field(
        default="warn",
        description="Measure at load what the KV format does to the model; where it hurts, "
        "warn or refuse",
    )


class EngineConfig(EngineSettings):
    """What an engine is built from: its settings and the model.

    Building one raises ConfigError that names the field at fault.
    """

    model: str = Field(
        min_length=1, description="A name, a Hugging Face directory, a GGUF file, or a hub name"
    )

    @model_validator(mode="wrap")
    @classmethod
    def _named_errors(cls, values: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            config = build(values)
        except ValidationError as error:
            raise config_error(error) from None
        config._check_together()
        return config

    def replace(self, **changes: object) -> EngineConfig:
        """The same with some fields changed, checked as a new one is."""
        return EngineConfig.model_validate({**dict(self), **changes})

    def _check_together(self) -> None:
        """What no field can check alone."""
        fmt = get_format(self.kv_format)
        if fmt.needs_calibration and self.calibration is None:
            raise ConfigError(
                "calibration",
                f"{fmt.name} needs a calibration file; make one with: "
                + calibrate_command(self.model, fmt.name),
            )
        if self.calibration is not None and not fmt.needs_calibration:
            raise ConfigError("calibration", f"{fmt.name} needs none, got {self.calibration}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}), so that every running "
                f"sequence can decode in every step; got {self.max_num_batched_tokens}",
            )


def config_error(error: ValidationError) -> ConfigError:
    """The first fault that pydantic found, named by the path of its field."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"]) or "configuration"
    return ConfigError(path, _sentence(first))


def _sentence(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "is not a setting; `kvmesh config` prints all there are"
    if fault["type"] == "missing":
        return "is required, and was not given"
    message = str(fault["msg"]).removeprefix("Value error, ")
    # "Input should be ...", "String should match ...": the field's name stands before it.
    message = re.sub(r"^\w+ should ", "must ", message)
    return f"{message[0].lower()}{message[1:]}, got {fault['input']!r}"


def calibrate_command(model: str, kv_format: str) -> str:
    """The command that makes the calibration file of a model and format."""
    return (
        f"kvmesh calibrate --model {model} --kv-format {kv_format} "
        f"--text TEXT --output {kv_format}.safetensors"
    )
