"""The settings of an engine. Torch-free, because the control plane builds them.

The control plane nests `EngineSettings` in its YAML file. An engine is built from an
`EngineConfig`, which adds the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from kvmesh.kernels.formats.registry import (
    DEFAULT,
    format_names,
    get_format,
    similar_format,
)
from kvmesh.workers.device_limits import DeviceLimits, device_limits
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.pool_plan import AUTO_MAX_HOT_SHARE, DEFAULT_MAX_HOT_SHARE
from kvmesh.workers.quantities import (
    AUTO,
    AutoCount,
    AutoSwitch,
    Bytes,
    Number,
    Seconds,
    Switch,
    Tokens,
    WholeNumber,
)
from kvmesh.workers.rope_override import RopeOverride
from kvmesh.workers.settings import Settings, error_of, problems_of
from kvmesh.workers.step_limit import DEFAULT_STEP_TIMEOUT_S

PAGE_SIZES = (16, 32, 64, 128, 256)
DEFAULT_CPU_KV_MEMORY_BYTES = 1 << 30

_PAGE_SIZE_LIST = ", ".join(map(str, PAGE_SIZES))


def _known_format(name: str) -> str:
    try:
        get_format(name)
    except ValueError:
        similar = similar_format(name)
        if similar is None:
            raise ValueError(f"must be one of {', '.join(format_names())}") from None
        raise ValueError(
            f"must be a KV format (did you mean {similar}? `kvmesh formats` lists all)"
        ) from None
    return name


def _known_page_size(page_size: int) -> int:
    if page_size not in PAGE_SIZES:
        raise ValueError(f"must be one of {_PAGE_SIZE_LIST}")
    return page_size


def _text_of_alias(name: object) -> object:
    """LMDeploy's policy numbers are names of formats, and YAML reads them as numbers."""
    return str(name) if type(name) is int else name


def _format_spellings() -> Iterator[str | int]:
    for name in format_names():
        yield name
        for alias in get_format(name).aliases:
            yield from (alias, int(alias)) if alias.isdigit() else (alias,)


FormatName = Annotated[
    str,
    BeforeValidator(_text_of_alias),
    AfterValidator(_known_format),
    WithJsonSchema({"enum": list(_format_spellings())}),
]
PageSize = Annotated[
    WholeNumber, AfterValidator(_known_page_size), WithJsonSchema({"enum": list(PAGE_SIZES)})
]


WeightFormatName = Literal["exact", "int8", "int4", "fp8", "decoded"]
WEIGHT_FORMATS: tuple[WeightFormatName, ...] = get_args(WeightFormatName)


class EngineSettings(Settings):
    """One group's engine."""

    kv_format: FormatName = Field(
        default=DEFAULT,
        description=f"How sealed KV pages are encoded: {', '.join(format_names())}; default: "
        "k8v4, or int8 for models with latent attention",
    )
    calibration: str | None = Field(
        default=None,
        description="File of `kvmesh calibrate`, the same on every node; for calibrated formats",
    )
    page_size: PageSize = Field(default=64, description=f"Tokens a page: one of {_PAGE_SIZE_LIST}")
    sink_pages: WholeNumber | None = Field(
        default=None, ge=0, description="First pages kept exact; null: the format's default"
    )
    recent_pages: WholeNumber | None = Field(
        default=None, ge=0, description="Latest pages kept exact; null: the format's default"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute dtype; auto: bfloat16 on GPUs, float32 on CPUs"
    )
    weight_format: WeightFormatName = Field(
        default="exact",
        description="How weights are stored; exact: on GPUs as in the checkpoint, on CPUs in the "
        "fewest bits that hold their values; int8, int4, fp8: rounded at load; decoded: in the "
        "compute dtype",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: GPUs if there are any"
    )
    tp: WholeNumber = Field(
        default=1,
        ge=1,
        description="Shares of the heads, each on ranks of its own; must divide "
        "the number of KV heads",
    )
    kvp: WholeNumber = Field(
        default=1,
        ge=1,
        description="Ranks among which the pages of a sequence are dealt, for each share of the "
        "heads; a group has tp · kvp ranks",
    )
    expert_parallel: Switch = Field(
        default=False,
        description="In mixtures of experts, ranks have whole experts instead of a part of each; "
        "tp must divide the number of experts",
    )
    rope: RopeOverride | None = Field(
        default=None,
        description="RoPE scaling instead of the model's own, to serve a longer context than it "
        "was trained for; null: the model's own",
    )
    kv_memory_bytes: Bytes | None = Field(
        default=None,
        description="KV memory of one rank, e.g. 512MiB; "
        "null: what gpu_memory_utilization leaves of a GPU, or 1 GiB on CPUs",
    )
    gpu_memory_utilization: Number = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of a GPU that weights, activations and KV may fill",
    )
    max_num_seqs: AutoCount = Field(
        default=AUTO,
        description="Maximum sequences that run at a time; auto: 16 on CPUs, on GPUs 64 to 256 by "
        "their memory",
    )
    max_hot_share: Number = Field(
        default=DEFAULT_MAX_HOT_SHARE,
        gt=0,
        lt=1,
        description="Share of the KV memory that exact pages may use, on GPUs at most 0.125 while "
        "max_num_seqs is auto; more than half suits short sequences in formats with exact windows",
    )
    max_num_batched_tokens: AutoCount = Field(
        default=AUTO,
        description="Maximum tokens of a step; longer prompts are chunked. auto: 512 on CPUs, on "
        "GPUs 1024 to 8192 by their memory, and at least max_num_seqs",
    )
    max_step_s: Seconds | None = Field(
        default=None,
        description="Seconds that a step may take while sequences decode: prompts are chunked to "
        "fit, at least to twice the time of decoding alone; null: 0.1 on GPUs, unlimited on CPUs",
    )
    max_model_len: Tokens | None = Field(
        default=None,
        description="Maximum tokens of a sequence, e.g. 131072, 128k or 1M; null: the model's",
    )
    prefix_cache: Switch = Field(
        default=True,
        description="Share sealed pages between equal prefixes; off for models with recurrent "
        "layers",
    )
    max_pinned_share: Number = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of a group's pages that pinned prompts (pin_s) may hold; 0: no prompt "
        "can be pinned",
    )
    max_pinned_share_per_key: Number = Field(
        default=0.25,
        ge=0,
        le=1,
        description="... and those of one tenant, within max_pinned_share",
    )
    threads_per_rank: WholeNumber | None = Field(
        default=None,
        ge=1,
        description="Threads of a rank on CPUs; null: the machine's, divided among a group's ranks",
    )
    cuda_graphs: AutoSwitch = Field(
        default=AUTO,
        description="Run decode steps from CUDA graphs; auto: on GPUs, but not with deterministic "
        "or a KV format for comparison",
    )
    deterministic: Switch = Field(
        default=False,
        description="A sequence's logits have the same bits with whatever it is computed, in any "
        "chunks and from the cache; slower (docs/deterministic.md)",
    )
    step_timeout_s: Seconds = Field(
        default=DEFAULT_STEP_TIMEOUT_S,
        description="Seconds without an answer after which ranks count as hung and the group is "
        "replaced; longer for steps that are slower by experience, and for the first of their kind",
    )
    kv_probe: Literal["off", "warn", "refuse"] = Field(
        default="warn",
        description="Measure at start how much the KV format degrades the model; if too much, "
        "warn or refuse to start",
    )

    @property
    def ranks(self) -> int:
        """Of a group."""
        return self.tp * self.kvp

    def limits(self, device: str, memory_bytes: int = 0) -> DeviceLimits:
        """What is `auto`, for a device; what is given, as it is.

        device: cpu or cuda; memory_bytes: all that a GPU has
        """
        auto = device_limits(device, memory_bytes)
        given_seqs, given_tokens = self.max_num_seqs, self.max_num_batched_tokens
        # Every running sequence must be able to decode in every step.
        min_tokens = given_seqs if isinstance(given_seqs, int) else 1
        tokens = max(auto.max_num_batched_tokens, min_tokens)
        tokens = given_tokens if isinstance(given_tokens, int) else tokens
        seqs = min(auto.max_num_seqs, tokens)
        seqs = given_seqs if isinstance(given_seqs, int) else seqs
        graphs = auto.cuda_graphs if self.cuda_graphs == AUTO else self.cuda_graphs
        # A graph cannot hold what plain torch decides as it reads pages.
        graphs = graphs and device != "cpu" and not get_format(self.kv_format).comparison
        # Its attention is divided by the step's lengths.
        graphs = graphs and not self.deterministic
        return DeviceLimits(seqs, tokens, graphs)

    def hot_share(self, device: str) -> float:
        """At most this share of the KV memory holds exact pages, of as many sequences as fit it.

        Where the number of sequences is a GPU's default, long contexts are worth more.
        """
        if device == "cuda" and self.max_num_seqs == AUTO:
            return min(self.max_hot_share, AUTO_MAX_HOT_SHARE)
        return self.max_hot_share

    def conflicts(self) -> list[ConfigError]:
        """What is wrong with fields that depend on one another."""
        found: list[ConfigError] = []
        fmt = get_format(self.kv_format)
        if fmt.needs_calibration and self.calibration is None:
            found.append(
                ConfigError(
                    "calibration",
                    f"{fmt.name} needs a calibration file; make one with: "
                    + calibrate_command("MODEL", fmt.name),
                )
            )
        if self.calibration is not None and not fmt.needs_calibration:
            found.append(
                ConfigError(
                    "calibration",
                    f"must be null, because {fmt.name} needs no calibration; "
                    f"got {self.calibration}",
                )
            )
        if self.cuda_graphs is True and fmt.comparison:
            found.append(
                ConfigError(
                    "cuda_graphs",
                    f"must be auto or false with {fmt.name}, which is for comparison: it has no "
                    "kernels that a graph could hold",
                )
            )
        if self.deterministic:
            found += self._hinder_determinism()
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if isinstance(seqs, int) and isinstance(tokens, int) and tokens < seqs:
            found.append(
                ConfigError(
                    "max_num_batched_tokens",
                    f"must be at least max_num_seqs ({seqs}), so that every running sequence can "
                    f"decode in every step; got {tokens}",
                )
            )
        return found

    def _hinder_determinism(self) -> list[ConfigError]:
        """Settings that `deterministic` cannot hold with."""
        found = []
        if get_format(self.kv_format).comparison:
            found.append(
                ConfigError(
                    "kv_format",
                    f"must be a format to serve with deterministic; {self.kv_format} is for "
                    "comparison, and plain torch reads it",
                )
            )
        if self.cuda_graphs is True:
            found.append(
                ConfigError("cuda_graphs", "must be auto or false with deterministic; got true")
            )
        return found


class EngineConfig(EngineSettings):
    """The configuration of an engine: its settings and the model.

    Raises ConfigError naming the invalid field; ConfigErrors if there are several.
    """

    model: str = Field(
        min_length=1,
        description="The embedded model's name, a Hugging Face directory, "
        "a GGUF file, or a hub name (owner/name, or owner/name@revision)",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, values: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            config = build(values)
        except ValidationError as error:
            raise error_of(problems_of(error, cls)) from None
        if conflicts := config.conflicts():
            raise error_of(conflicts)
        return config

    def replace(self, **changes: object) -> EngineConfig:
        """A copy with some fields changed, validated like a new one."""
        return EngineConfig.model_validate({**dict(self), **changes})


def calibrate_command(model: str, kv_format: str) -> str:
    """The command that makes the calibration file of a model and format."""
    return (
        f"kvmesh calibrate --model {model} --kv-format {kv_format} "
        f"--text TEXT --output {kv_format}.safetensors"
    )
