"""The YAML file that configures a cluster, with the documentation of each field.

`load` reads it, `ClusterConfig.engine_config` makes an engine's configuration from
it, and `default_yaml` prints the defaults with their documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.workers.byte_size import Bytes
from kvmesh.workers.config import (
    EngineConfig,
    EngineSettings,
    FormatName,
    Settings,
    config_error,
)
from kvmesh.workers.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]


class EngineSection(EngineSettings):
    """One group's engine."""

    cpus_per_rank: float = Field(
        default=1.0, ge=0, description="CPUs a rank asks Ray for (logical, not threads)"
    )


class IngressSection(Settings):
    """The gRPC endpoint that clients connect to."""

    replicas: int = Field(
        default=1, ge=1, le=64, description="Ingress processes; with 2 or more, one may crash"
    )
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0: all interfaces"
    )
    port: Port = Field(default=9000, description="gRPC port; 0: any free one")
    http_port: Port = Field(
        default=0, description="Port of Ray Serve's HTTP health check; 0: any free one"
    )
    max_streams: int = Field(
        default=1024, ge=1, description="Concurrent calls of one ingress process"
    )
    max_request_bytes: Bytes = Field(
        default=16 << 20,
        description="Maximum size of a request; a million token ids are about 4 MB",
    )
    max_stop_strings: int = Field(default=16, ge=0, description="Maximum stop strings of a request")
    max_stop_chars: int = Field(
        default=1024, ge=1, description="Maximum characters of a stop string"
    )
    max_choices: int = Field(default=16, ge=1, description="Maximum n of a request")
    default_max_tokens: int = Field(
        default=256, ge=1, description="Output tokens of a request that does not set max_tokens"
    )
    kv_divergence_nats: dict[FormatName, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = (
        Field(
            default_factory=dict,
            description="By KV format: its divergence from exact KV on your model (`kvmesh eval "
            "perplexity`, KL), for max_kv_divergence_nats; formats that are not named have the "
            "figures of docs/kv_formats.md",
        )
    )


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
    admin: bool = Field(
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
        description="Accepted keys; empty: a key is generated on first start, in key_file",
    )
    key_file: Path | None = Field(
        default=None,
        description="File of the generated key (mode 0600); null: where the SDK looks for it",
    )


class TenantSection(Settings):
    """Limits of one tenant."""

    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Share of KV memory relative to other tenants",
    )
    quota_bytes: Bytes | None = Field(
        default=None, description="Maximum KV bytes leased to it at a time; null: no limit"
    )


class RouterSection(Settings):
    """Placement of requests on groups, and the queue."""

    max_queued: int = Field(default=256, ge=0, description="Requests that may wait for pages")
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


class MetricsSection(Settings):
    """Prometheus."""

    port: Port = Field(
        default=0, description="Port of the node's Prometheus endpoint; 0: any free one"
    )


class TimeoutSection(Settings):
    """Time limits, in seconds."""

    start_s: Seconds = Field(
        default=900.0, description="From deployment to ready, including downloads"
    )
    request_s: Seconds | None = Field(
        default=None, description="Default timeout of a request; null: none"
    )
    drain_s: Seconds = Field(
        default=30.0, description="How long shutdown waits for running requests"
    )
    health_period_s: Seconds = Field(default=2.0, description="Between health checks of an engine")


class RaySection(Settings):
    """The Ray cluster: a local one, or one that is already running."""

    address: str | None = Field(
        default=None, description="Ray cluster to join; null: start a local one"
    )
    object_store_bytes: Bytes = Field(
        default=200 << 20, description="Object store of a local Ray cluster; kvmesh barely uses it"
    )
    dashboard: bool = Field(default=False, description="Start Ray's dashboard with a local cluster")


class ClusterConfig(Settings):
    """The configuration of a kvmesh cluster."""

    model: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="The embedded model's name, a Hugging Face directory, "
        "a GGUF file, or a hub name",
    )
    groups: int = Field(default=1, ge=1, le=512, description="Engine replicas")
    engine: EngineSection = Field(default=EngineSection(), description="Each group's engine")
    ingress: IngressSection = Field(
        default=IngressSection(), description="The endpoint for clients"
    )
    auth: AuthSection = Field(default=AuthSection(), description="Authentication")
    router: RouterSection = Field(default=RouterSection(), description="Placement and queue")
    metrics: MetricsSection = Field(default=MetricsSection(), description="Prometheus")
    timeouts: TimeoutSection = Field(
        default=TimeoutSection(), description="Time limits, in seconds"
    )
    ray: RaySection = Field(default=RaySection(), description="The Ray cluster")

    def engine_config(self) -> EngineConfig:
        """The configuration of each group's engine. Raises ConfigError naming the field."""
        values = self.engine.model_dump(exclude={"cpus_per_rank"})
        if self.engine.calibration is not None:
            # Ranks run in other working directories.
            values["calibration"] = str(Path(self.engine.calibration).expanduser().absolute())
        try:
            return EngineConfig(model=self.model, **values)
        except ConfigError as error:
            path = error.field if error.field == "model" else f"engine.{error.field}"
            raise ConfigError(path, error.message) from None


def build(values: Mapping[str, Any]) -> ClusterConfig:
    """A validated configuration. Raises ConfigError with the path of the field."""
    try:
        config = ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise config_error(error) from None
    config.engine_config()
    return config


def load(path: Path | None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Read `path` (None: the defaults) and apply `overrides`.

    overrides: values by dotted path, e.g. {"engine.tp": 2}; None values are skipped
    Raises ConfigError naming the file or the field.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise ConfigError("config", f"cannot read {path}: {reason}") from None
        except yaml.YAMLError as error:
            raise ConfigError("config", f"{path} is not valid YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                "config",
                f"{path} must contain a mapping of settings, got a {type(loaded).__name__}",
            )
        values = loaded or {}
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _put(values, dotted.split("."), value)
    return build(values)


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, part in enumerate(path[:-1], 1):
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(".".join(path[:depth]), f"must be a mapping, got {inner!r}")
        values = inner
    values[path[-1]] = value


def default_yaml() -> str:
    """The default configuration with comments; `load` reads it back unchanged."""
    return "\n".join(_document(ClusterConfig(), indent=0)) + "\n"


def _document(section: BaseModel, indent: int) -> list[str]:
    pad = "  " * indent
    lines: list[str] = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        lines.append(f"{pad}# {info.description}")
        if isinstance(value, BaseModel):
            lines.append(f"{pad}{name}:")
            lines.extend(_document(value, indent + 1))
        else:
            lines.append(f"{pad}{name}: {_scalar(value)}")
    return lines


def _scalar(value: object) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
