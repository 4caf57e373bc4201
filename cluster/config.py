"""The one YAML file that configures a cluster, and what each of its fields means.

`load` reads it, `ClusterConfig.engine_config` turns it into what an engine
takes, and `default_yaml` prints it with its documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.workers.byte_size import Bytes
from kvmesh.workers.config import EngineConfig, EngineSettings, Settings, config_error
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
    """Where clients come in."""

    replicas: int = Field(
        default=1, ge=1, le=64, description="Ingress processes; 2 or more outlive a crash"
    )
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0: all interfaces"
    )
    port: Port = Field(default=9000, description="gRPC port; 0: any free one")
    http_port: Port = Field(
        default=0, description="Port of Serve's own HTTP health page; 0: any free one"
    )
    max_streams: int = Field(
        default=1024, ge=1, description="Calls one ingress process serves at once"
    )
    max_request_bytes: Bytes = Field(
        default=16 << 20, description="Largest request; a million token ids are about 4 MB"
    )
    max_stop_strings: int = Field(default=16, ge=0, description="Stop strings a request may have")
    max_stop_chars: int = Field(
        default=1024, ge=1, description="Characters one stop string may have"
    )
    max_choices: int = Field(default=16, ge=1, description="Greatest n of a request")
    default_max_tokens: int = Field(
        default=256, ge=1, description="Output tokens where a request names no max_tokens"
    )


class TenantKey(Settings):
    """One API key, by its hash."""

    # A request is known to the router as tenant/request_id: a slash would let one tenant
    # name another's requests.
    tenant: str = Field(
        pattern="^[^/]+$", description="Name under which its use is accounted; no slash"
    )
    sha256: str = Field(
        pattern="^[0-9a-f]{64}$", description="SHA-256 of the key, in lower-case hexadecimal"
    )


class AuthSection(Settings):
    """Who may come in."""

    mode: Literal["api_key", "none"] = Field(
        default="api_key", description="none lets everybody in, and must be asked for"
    )
    keys: tuple[TenantKey, ...] = Field(
        default=(),
        description="Keys let in; empty: one is made on first start and kept in key_file",
    )
    key_file: Path | None = Field(
        default=None,
        description="Where the made key is kept (mode 0600); null: where the SDK looks",
    )


class TenantSection(Settings):
    """What one tenant may use."""

    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Share of KV memory beside others'"
    )
    quota_bytes: Bytes | None = Field(
        default=None, description="Most KV bytes leased to it at once; null: no limit"
    )


class RouterSection(Settings):
    """Who gets which group's pages, and who waits."""

    max_queued: int = Field(default=256, ge=0, description="Requests that may wait for pages")
    queue_timeout_s: Seconds = Field(
        default=120.0, description="Longest wait for pages, in seconds"
    )
    lease_ttl_s: Seconds = Field(
        default=10.0, description="Seconds after which a lease no engine reports is taken back"
    )
    report_period_s: Seconds = Field(default=1.0, description="Seconds between engines' reports")
    tenants: dict[str, TenantSection] = Field(
        default_factory=dict,
        description="By name: weight (1) and quota_bytes (no limit); others have the defaults",
    )

    def policies(self) -> dict[str, TenantPolicy]:
        """What the router's account of tenants takes."""
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
    """How long things may take, in seconds."""

    start_s: Seconds = Field(
        default=900.0, description="From deployment to ready, downloads included"
    )
    request_s: Seconds | None = Field(
        default=None, description="Longest a request may take; null: unlimited unless it says"
    )
    drain_s: Seconds = Field(default=30.0, description="What running requests get at shutdown")
    health_period_s: Seconds = Field(default=2.0, description="Between health checks of an engine")


class RaySection(Settings):
    """The Ray cluster: a local one, or one that runs already."""

    address: str | None = Field(
        default=None, description="Cluster to join; null: start a local one"
    )
    object_store_bytes: Bytes = Field(
        default=200 << 20, description="Object store of a local Ray; kvmesh hardly uses it"
    )
    dashboard: bool = Field(default=False, description="Start Ray's dashboard with a local Ray")


class ClusterConfig(Settings):
    """All of a kvmesh cluster."""

    model: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="The embedded model's name, a Hugging Face directory, "
        "a GGUF file, or a hub name",
    )
    groups: int = Field(default=1, ge=1, le=512, description="Engine replicas")
    engine: EngineSection = Field(default=EngineSection(), description="Each group's engine")
    ingress: IngressSection = Field(default=IngressSection(), description="Where clients come in")
    auth: AuthSection = Field(default=AuthSection(), description="Who may come in")
    router: RouterSection = Field(
        default=RouterSection(), description="Who gets pages, and who waits"
    )
    metrics: MetricsSection = Field(default=MetricsSection(), description="Prometheus")
    timeouts: TimeoutSection = Field(default=TimeoutSection(), description="Times, in seconds")
    ray: RaySection = Field(default=RaySection(), description="The Ray cluster")

    def engine_config(self) -> EngineConfig:
        """What each group's engine is built from; raises ConfigError naming the field."""
        values = self.engine.model_dump(exclude={"cpus_per_rank"})
        if self.engine.calibration is not None:
            # Ranks run in directories of their own.
            values["calibration"] = str(Path(self.engine.calibration).expanduser().absolute())
        try:
            return EngineConfig(model=self.model, **values)
        except ConfigError as error:
            path = error.field if error.field == "model" else f"engine.{error.field}"
            raise ConfigError(path, error.message) from None


def build(values: Mapping[str, Any]) -> ClusterConfig:
    """A validated configuration; raises ConfigError naming the field by its path."""
    try:
        config = ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise config_error(error) from None
    config.engine_config()
    return config


def load(path: Path | None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Read `path` (None: defaults) and lay `overrides` over it.

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
            raise ConfigError("config", f"{path} must hold a mapping of settings")
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
    """The documented default configuration, which `load` reads back as the default."""
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
