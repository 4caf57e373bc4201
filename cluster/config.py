"""The settings of a cluster, with the documentation of each.

`build` makes them from plain values. Those come from a file, the environment and the command
line (config_sources.py); config_text.py prints them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.workers.config import EngineConfig, EngineSettings, FormatName
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.generation_defaults import (
    NEUTRAL,
    DefaultSampling,
    read_sampling_defaults,
)
from kvmesh.workers.quantities import Bytes, Number, Seconds, Switch, WholeNumber, reader_of
from kvmesh.workers.settings import ConflictError, Settings, error_of, problems_of

# How models write tool calls (ingress/answers/syntaxes.py) and reasoning.
ToolParser: TypeAlias = Literal[
    "auto", "none", "hermes", "llama", "mistral", "mistral-v11", "deepseek", "deepseek-v31"
]
ReasoningParser: TypeAlias = Literal["auto", "none", "think"]

DEFAULT_MODEL = "smollm2-135m-instruct"
CONFIG_VERSION: Final = 1
MAX_GROUPS = 512
MAX_METERED_TENANTS = 100
LOCAL_TENANT = "local"  # of the generated key
# Settings that every group must have alike, and why.
SAME_IN_ALL_GROUPS = dict.fromkeys(
    ("page_size", "prefix_cache"),
    "because one hash per page stands for a prompt's prefix in all groups",
)

Port = Annotated[WholeNumber, Field(ge=0, le=65535)]


def _known_version(version: object) -> int:
    if str(version) != str(CONFIG_VERSION):
        raise ValueError(f"must be {CONFIG_VERSION}, the only version that this kvmesh reads")
    return CONFIG_VERSION


def _ipv4_host(host: str) -> str:
    # Serve's proxy listens on IPv4 for `::`, and calls replicas at 127.0.0.1 whatever the host is.
    if not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(
            "must be an IPv4 address or a name, without a port; "
            "0.0.0.0 for all interfaces (Ray Serve's proxy does not serve on IPv6)"
        )
    return host


def _origin(origin: str) -> str:
    # A browser sends it without a path, and it is compared as a whole.
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
        raise ValueError('must be like https://chat.example.com, without a path, or "*"')
    return origin


class EngineSection(EngineSettings):
    """One group's engine."""

    cpus_per_rank: Number = Field(
        default=1.0, ge=0, description="CPUs a rank asks Ray for (logical, not threads)"
    )


class GroupSection(EngineSection):
    """What one group's engine has otherwise than `engine`. Other fields are those of `engine`."""

    def applied_to(self, engine: EngineSection) -> EngineSection:
        """`engine` with the fields that were set here."""
        changes = {name: getattr(self, name) for name in self.model_fields_set}
        return engine.model_copy(update=changes)


class LayoutSection(Settings):
    """How the GPUs are divided into groups, and a group's into tp × kvp."""

    mode: Literal["given", "auto"] = Field(
        default="given",
        description="given: as groups, engine.tp and engine.kvp say; auto: `kvmesh serve` chooses "
        "those of the three that are not set, by the model's heads, the GPUs' memory and "
        "engine.max_model_len",
    )
    ranks: Annotated[WholeNumber, Field(ge=1, le=MAX_GROUPS)] | None = Field(
        default=None,
        description="With auto: ranks of all groups together, each on a GPU if there are any; "
        "null: all GPUs, or what is given on CPUs",
    )
    sequences: Annotated[WholeNumber, Field(ge=1)] | None = Field(
        default=None,
        description="With auto: sequences of engine.max_model_len tokens that must run at once, "
        "in all groups together; null: one for each GPU, or as many as fit",
    )
    reason: str | None = Field(
        default=None, description="Why auto chose what it did; written by `kvmesh serve`"
    )


class IngressSection(Settings):
    """The endpoints that clients connect to: gRPC, and OpenAI's API over HTTP."""

    replicas: WholeNumber = Field(
        default=1, ge=1, le=64, description="Ingress processes; with 2 or more, one may crash"
    )
    host: Annotated[str, AfterValidator(_ipv4_host)] = Field(
        default="127.0.0.1",
        description="Address to listen on, of IPv4; 0.0.0.0: all interfaces",
    )
    port: Port = Field(default=9000, description="gRPC port; 0: any free one")
    http_port: Port = Field(
        default=8000,
        description="HTTP port, of OpenAI's API and Ray Serve's health check; 0: any free one",
    )
    allowed_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = Field(
        default=(),
        description="Web pages that may call the HTTP API from a browser, by their origins, such "
        'as https://chat.example.com; "*": all, which without keys lets any page use the models',
    )
    max_streams: WholeNumber = Field(
        default=1024,
        ge=1,
        description="Concurrent calls of one ingress process; with keys of several tenants, at "
        "most three quarters are of one tenant",
    )
    max_request_bytes: Bytes = Field(
        default=16 << 20,
        description="Maximum size of a request; a million token ids are up to 3 MB over gRPC",
    )
    max_stop_strings: WholeNumber = Field(
        default=16, ge=0, description="Maximum stop strings of a request"
    )
    max_stop_chars: WholeNumber = Field(
        default=1024, ge=1, description="Maximum characters of a stop string"
    )
    max_choices: WholeNumber = Field(default=16, ge=1, description="Maximum n of a request")
    default_max_tokens: WholeNumber = Field(
        default=256,
        ge=1,
        description="Output tokens of a request that does not set max_tokens, or what is left of "
        "the context",
    )
    tool_parser: ToolParser = Field(
        default="auto",
        description="How the model writes tool calls; auto: as its chat template shows",
    )
    reasoning_parser: ReasoningParser = Field(
        default="auto",
        description="think: the model reasons between <think> and </think>; auto: if its chat "
        "template or its special tokens have them",
    )
    kv_divergence_nats: dict[FormatName, Annotated[Number, Field(ge=0)]] = Field(
        default_factory=dict,
        description="By KV format: its divergence from exact KV on your model (`kvmesh eval "
        "perplexity`, KL), for max_kv_divergence_nats; formats that are not named have what "
        "engine.kv_probe measures, and without it the figures of docs/kv_formats.md",
    )


class GenerationSection(Settings):
    """Sampling of requests that set nothing themselves."""

    source: Literal["model", "neutral"] = Field(
        default="model",
        description="Where defaults come from that are null here. model: its "
        "generation_config.json, if it has one; neutral: sampling from the whole distribution",
    )
    temperature: Number | None = Field(
        default=None, ge=0, le=100, description="Default temperature; null: that of `source`"
    )
    top_p: Number | None = Field(
        default=None, gt=0, le=1, description="Default top_p; null: that of `source`"
    )
    top_k: WholeNumber | None = Field(
        default=None, ge=0, description="Default top_k; 0: all tokens; null: that of `source`"
    )
    min_p: Number | None = Field(
        default=None, ge=0, le=1, description="Default min_p; null: that of `source`"
    )
    repetition_penalty: Number | None = Field(
        default=None,
        ge=0.01,
        le=100,
        description="Default repetition_penalty; null: that of `source`",
    )
    presence_penalty: Number | None = Field(
        default=None,
        ge=-100,
        le=100,
        description="Default presence_penalty; null: that of `source`",
    )
    frequency_penalty: Number | None = Field(
        default=None,
        ge=-100,
        le=100,
        description="Default frequency_penalty; null: that of `source`",
    )

    def defaults(self, model: Path) -> DefaultSampling:
        """What requests get that set nothing themselves.

        model: its directory; raises ConfigError if its values are wrong, and needed
        """
        own = read_sampling_defaults(model) if self.source == "model" else NEUTRAL
        return own.overridden_by(DefaultSampling(**self.model_dump(exclude={"source"})))


class TenantKey(Settings):
    """One API key, by its hash."""

    # The router knows a request as tenant/request_id: with a slash in its name, a tenant could
    # address another tenant's requests.
    tenant: str = Field(
        pattern="^[^/]+$", description="Tenant whose usage is counted; must not contain a slash"
    )
    sha256: str = Field(
        pattern="^[0-9a-f]{64}$", description="SHA-256 of the key, in lower-case hexadecimal"
    )
    admin: Switch = Field(
        default=False, description="Whether it may see the loads of all tenants, as operators do"
    )


class AuthSection(Settings):
    """Authentication of clients."""

    mode: Literal["api_key", "none"] = Field(
        default="api_key",
        description="api_key: every request needs a key; none: anyone may send requests",
    )
    keys: tuple[TenantKey, ...] = Field(
        default=(),
        description="Accepted keys; without any, and without key_directory, a key is generated on "
        "first start, in key_file",
    )
    key_file: Path | None = Field(
        default=None,
        description="File of the generated key (mode 0600); null: where the SDK looks for it",
    )
    key_directory: Path | None = Field(
        default=None,
        description="Directory with accepted keys, such as a mounted Secret: a file for each "
        "tenant, named after it or TENANT.admin, with one key a line; it is read again when it "
        "changes",
    )


class TenantSection(Settings):
    """Limits of one tenant."""

    weight: Number = Field(
        default=1.0, gt=0, description="Share of KV memory relative to other tenants"
    )
    quota_bytes: Bytes | None = Field(
        default=None,
        description="Maximum KV bytes leased to it at a time, for its requests to start; outputs "
        "that grow count, but are not held up; null: no limit",
    )


class RouterSection(Settings):
    """Placement of requests on groups, and the queue."""

    max_queued: WholeNumber = Field(
        default=256,
        ge=0,
        description="Requests that may wait for pages, besides those that lost their group",
    )
    queue_timeout_s: Seconds = Field(
        default=120.0, description="Maximum wait for pages, in seconds"
    )
    lease_ttl_s: Seconds = Field(
        default=10.0, description="Seconds until a lease that no engine reports expires"
    )
    report_period_s: Seconds = Field(default=1.0, description="Seconds between engines' reports")
    tenants: dict[str, TenantSection] = Field(
        default_factory=dict,
        description="By name: weight and quota_bytes; other tenants have weight 1 and no quota",
    )

    def policies(self) -> dict[str, TenantPolicy]:
        """The settings as the router's fairness policy takes them."""
        return {
            name: TenantPolicy(tenant.weight, tenant.quota_bytes)
            for name, tenant in self.tenants.items()
        }


class AutoscalingSection(Settings):
    """How many groups run, by what waits and what leases hold."""

    min_groups: Annotated[WholeNumber, Field(ge=1, le=MAX_GROUPS)] | None = Field(
        default=None,
        description="Groups that always run, the first ones of `groups`; the others are added and "
        "removed with the load. null: all groups run",
    )
    wait_s: Seconds = Field(
        default=5.0,
        description="A group is added when a request that comes would wait for longer than this "
        "many seconds, when requests are refused, or when the groups are nearly full",
    )
    up_after_s: Seconds = Field(
        default=5.0, description="... for this long; at once when requests are refused"
    )
    down_after_s: Seconds = Field(
        default=300.0,
        description="A group is removed when the others have been enough for this long",
    )


class MetricsSection(Settings):
    """Prometheus."""

    port: Port = Field(
        default=0, description="Port of a local cluster's Prometheus endpoint; 0: any free one"
    )
    tenants: WholeNumber = Field(
        default=0,
        ge=0,
        le=MAX_METERED_TENANTS,
        description="How many tenants have metrics of their own: the first of auth.keys, then "
        "of auth.key_directory; all others are `other`. 0: metrics do not tell tenants apart",
    )


class TracesSection(Settings):
    """OpenTelemetry traces, one for each generation. Need `pip install 'kvmesh[traces]'`."""

    endpoint: str | None = Field(
        default=None,
        pattern="^https?://[^/]+$",
        description="OTLP receiver (gRPC), e.g. http://collector:4317; null: no traces. Headers "
        "for it are in the environment: OTEL_EXPORTER_OTLP_HEADERS",
    )
    sample_ratio: Number = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of generations that are traced; those whose caller traces always are, "
        "those whose caller has decided not to are not",
    )


class TimeoutSection(Settings):
    """Time limits, in seconds."""

    start_s: Seconds = Field(
        default=900.0,
        description="From deployment to ready, including downloads by nodes without the model",
    )
    request_s: Seconds | None = Field(
        default=None,
        description="Maximum time of a request, from its arrival; a longer timeout_s, or none, "
        "means this one. null: no limit",
    )
    drain_s: Seconds = Field(
        default=30.0,
        description="How long a shutdown, or a process that is replaced or removed, waits for "
        "running requests",
    )
    health_period_s: Seconds = Field(
        default=2.0, description="Between health checks of a process: router, engine or ingress"
    )


class RaySection(Settings):
    """The Ray cluster: a local one, or one that is already running."""

    address: str | None = Field(
        default=None, description="Ray cluster to join; null: start a local one"
    )
    object_store_bytes: Bytes = Field(
        default=200 << 20, description="Object store of a local Ray cluster; kvmesh barely uses it"
    )
    dashboard: Switch = Field(
        default=False, description="Start Ray's dashboard with a local cluster, and its monitors"
    )


def _kind_of_groups(groups: object) -> str:
    return "[list]" if isinstance(groups, list | tuple) else "[number]"


_read_groups = reader_of(
    "a whole number of groups, or a list with what each has otherwise than `engine`", {}, whole=True
)
Groups = Annotated[
    Annotated[int, Field(ge=1, le=MAX_GROUPS), BeforeValidator(_read_groups), Tag("[number]")]
    | Annotated[
        tuple[GroupSection, ...],
        Field(json_schema_extra={"minItems": 1, "maxItems": MAX_GROUPS}),
        Tag("[list]"),
    ],
    Discriminator(_kind_of_groups),
]


class ClusterConfig(Settings):
    """The configuration of a kvmesh cluster."""

    version: Annotated[Literal[1], BeforeValidator(_known_version)] = Field(
        default=CONFIG_VERSION, description="Version of this format"
    )
    model: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="The embedded model's name, a Hugging Face directory, "
        "a GGUF file, or a hub name (owner/name, or owner/name@revision)",
    )
    engine: EngineSection = Field(default=EngineSection(), description="Each group's engine")
    groups: Groups = Field(
        default=1,
        description="Engine replicas: their number, or a list with what each has otherwise than "
        "`engine`, e.g. [{kv_format: int8}, {kv_format: k4v4}]",
    )
    layout: LayoutSection = Field(
        default=LayoutSection(), description="How GPUs are divided into groups and ranks"
    )
    autoscaling: AutoscalingSection = Field(
        default=AutoscalingSection(), description="Groups that come and go with the load"
    )
    ingress: IngressSection = Field(
        default=IngressSection(), description="The endpoints for clients"
    )
    generation: GenerationSection = Field(
        default=GenerationSection(), description="Sampling of requests that set nothing themselves"
    )
    auth: AuthSection = Field(default=AuthSection(), description="Authentication")
    router: RouterSection = Field(default=RouterSection(), description="Placement and queue")
    metrics: MetricsSection = Field(default=MetricsSection(), description="Prometheus")
    traces: TracesSection = Field(default=TracesSection(), description="OpenTelemetry traces")
    timeouts: TimeoutSection = Field(
        default=TimeoutSection(), description="Time limits, in seconds"
    )
    ray: RaySection = Field(default=RaySection(), description="The Ray cluster")

    @field_validator("groups")
    @classmethod
    def _check_groups(
        cls, groups: int | tuple[GroupSection, ...], info: ValidationInfo
    ) -> int | tuple[GroupSection, ...]:
        if isinstance(groups, tuple) and not 1 <= len(groups) <= MAX_GROUPS:
            raise ValueError(f"must have 1 to {MAX_GROUPS} entries")
        # Without a valid `engine`, there is nothing that groups could conflict with.
        engine = info.data.get("engine")
        if engine is not None and (problems := _conflicts_between(engine, groups)):
            raise ConflictError(problems)
        return groups

    @field_validator("autoscaling")
    @classmethod
    def _check_autoscaling(
        cls, autoscaling: AutoscalingSection, info: ValidationInfo
    ) -> AutoscalingSection:
        groups, min_groups = info.data.get("groups"), autoscaling.min_groups
        if groups is None or min_groups is None:
            return autoscaling
        number = groups if isinstance(groups, int) else len(groups)
        if min_groups > number:
            message = f"must be at most the number of groups, {number}, got {min_groups}"
            raise ConflictError([ConfigError("autoscaling.min_groups", message)])
        return autoscaling

    def group_engines(self) -> dict[str, EngineSection]:
        """By name, the settings of each group's engine."""
        return {f"engine-{i}": e for i, e in enumerate(_engines(self.engine, self.groups))}

    def first_groups(self) -> dict[str, EngineSection]:
        """Those of `group_engines` that run from the start: all, or as many as always run."""
        return dict(islice(self.group_engines().items(), self.autoscaling.min_groups))

    def engine_config(self, group: str = "engine-0") -> EngineConfig:
        """The configuration of a group's engine."""
        engine = self.group_engines()[group]
        values = engine.model_dump(exclude={"cpus_per_rank"})
        if engine.calibration is not None:
            # Ranks run in other working directories.
            values["calibration"] = str(Path(os.path.expanduser(engine.calibration)).absolute())
        return EngineConfig(model=self.model, **values)


def _engines(engine: EngineSection, groups: int | tuple[GroupSection, ...]) -> list[EngineSection]:
    if isinstance(groups, int):
        return [engine] * groups
    return [group.applied_to(engine) for group in groups]


def _conflicts_between(
    engine: EngineSection, groups: int | tuple[GroupSection, ...]
) -> list[ConfigError]:
    """What is wrong with the engines of groups, each of whose settings are valid alone."""
    if isinstance(groups, int):
        return [ConfigError(f"engine.{x.field}", x.message) for x in engine.conflicts()]
    engines = _engines(engine, groups)
    problems = [
        ConfigError(f"groups.{index}.{x.field}", x.message)
        for index, each in enumerate(engines)
        for x in each.conflicts()
    ]
    for name, why in SAME_IN_ALL_GROUPS.items():
        expected = getattr(engines[0], name)
        problems += [
            ConfigError(
                f"groups.{index}.{name}",
                f"must be the same in all groups, {why}; it is {expected} in the first one, "
                f"got {getattr(each, name)}",
            )
            for index, each in enumerate(engines)
            if getattr(each, name) != expected
        ]
    return problems


def build(values: Mapping[str, Any]) -> ClusterConfig:
    """A validated configuration.

    Raises ConfigError with the path of the setting; ConfigErrors if several are wrong.
    """
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise error_of(problems_of(error, ClusterConfig)) from None
