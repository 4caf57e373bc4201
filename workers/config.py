"""The settings of an engine. Torch-free, because the control plane builds them.

The control plane nests `EngineSettings` in its YAML file. An engine is built from an
`EngineConfig`, which adds the model.
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
from kvmesh.workers.step_limit import DEFAULT_STEP_TIMEOUT_S

PAGE_SIZES = (16, 32, 64, 128, 256)
DEFAULT_CPU_KV_MEMORY_BYTES = 1 << 30

_PAGE_SIZE_LIST = ", ".join(map(str, PAGE_SIZES))


def _known_format(name: str) -> str:
    try:
        get_format(name)
    except ValueError:
        raise ValueError(f"must be one of {', '.join(format_names())}") from None
    return name


def _known_page_size(page_size: int) -> int:
    if page_size not in PAGE_SIZES:
        raise ValueError(f"must be one of {_PAGE_SIZE_LIST}")
    return page_size


FormatName = Annotated[str, AfterValidator(_known_format)]
PageSize = Annotated[int, AfterValidator(_known_page_size)]


class Settings(BaseModel):
    """Immutable settings. Unknown names are errors, and defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class EngineSettings(Settings):
    """One group's engine."""

    kv_format: FormatName = Field(
        default="int8", description=f"How sealed KV pages are encoded: {', '.join(format_names())}"
    )
    calibration: str | None = Field(
        default=None,
        description="File of `kvmesh calibrate`, the same on every node; for calibrated formats",
    )
    page_size: PageSize = Field(default=64, description=f"Tokens a page: one of {_PAGE_SIZE_LIST}")
    sink_pages: int | None = Field(
        default=None, ge=0, description="First pages kept exact; null: the format's default"
    )
    recent_pages: int | None = Field(
        default=None, ge=0, description="Latest pages kept exact; null: the format's default"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute dtype; auto: bfloat16 on GPUs, float32 on CPUs"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: GPUs if there are any"
    )
    tp: int = Field(
        default=1, ge=1, description="Tensor-parallel ranks; must divide the number of KV heads"
    )
    kv_memory_bytes: Bytes | None = Field(
        default=None,
        description="KV memory of one rank, e.g. 512MiB; "
        "null: the GPU's free memory, or 1 GiB on CPUs",
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of a GPU that weights, activations and KV may fill",
    )
    max_num_seqs: int = Field(default=16, ge=1, description="Maximum sequences that run at a time")
    max_hot_share: float = Field(
        default=DEFAULT_MAX_HOT_SHARE,
        gt=0,
        lt=1,
        description="Share of the KV memory that exact pages may use; more than half suits "
        "short sequences in formats with exact windows",
    )
    max_num_batched_tokens: int = Field(
        default=512, ge=1, description="Maximum tokens of a step; longer prompts are chunked"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Maximum tokens of a sequence; null: the model's limit"
    )
    prefix_cache: bool = Field(
        default=True, description="Share sealed pages between equal prefixes"
    )
    threads_per_rank: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of a rank; null: the machine's, divided among the ranks",
    )
    cuda_graphs: bool = Field(
        default=False, description="Run decode steps from CUDA graphs; no effect on CPUs"
    )
    step_timeout_s: float = Field(
        default=DEFAULT_STEP_TIMEOUT_S,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without an answer after which ranks count as hung and the group is "
        "replaced; longer for steps that are slower by experience, and for the first of their kind",
    )
    kv_probe: Literal["off", "warn", "refuse"] = Field(
        default="warn",
        description="Measure at start how much the KV format degrades the model; if too much, "
        "warn or refuse to start",
    )


class EngineConfig(EngineSettings):
    """The configuration of an engine: its settings and the model.

    Raises ConfigError naming the invalid field.
    """

    model: str = Field(
        min_length=1,
        description="The embedded model's name, a Hugging Face directory, "
        "a GGUF file, or a hub name",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, values: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            config = build(values)
        except ValidationError as error:
            raise config_error(error) from None
        config._check_together()
        return config

    def replace(self, **changes: object) -> EngineConfig:
        """A copy with some fields changed, validated like a new one."""
        return EngineConfig.model_validate({**dict(self), **changes})

    def _check_together(self) -> None:
        """Validate fields that depend on one another."""
        fmt = get_format(self.kv_format)
        if fmt.needs_calibration and self.calibration is None:
            raise ConfigError(
                "calibration",
                f"{fmt.name} needs a calibration file; make one with: "
                + calibrate_command(self.model, fmt.name),
            )
        if self.calibration is not None and not fmt.needs_calibration:
            raise ConfigError(
                "calibration",
                f"must be null, because {fmt.name} needs no calibration; got {self.calibration}",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}), so that every running "
                f"sequence can decode in every step; got {self.max_num_batched_tokens}",
            )


def config_error(error: ValidationError) -> ConfigError:
    """The first of pydantic's errors, with the path of its field."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"]) or "configuration"
    return ConfigError(path, _message(first))


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a setting; `kvmesh config` prints all settings"
    if error["type"] == "missing":
        return "is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    # "Input should be ..." and "String should match ..." follow the name of the field.
    message = re.sub(r"^\w+ should ", "must ", message)
    return f"{message[0].lower()}{message[1:]}, got {error['input']!r}"


def calibrate_command(model: str, kv_format: str) -> str:
    """The command that makes the calibration file of a model and format."""
    return (
        f"kvmesh calibrate --model {model} --kv-format {kv_format} "
        f"--text TEXT --output {kv_format}.safetensors"
    )
