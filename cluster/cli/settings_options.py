"""The options of commands that read a cluster's settings."""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from kvmesh.cluster.config_sources import LoadedConfig

# The settings that have flags, by the name of the flag's field.
FLAGS: Final = {
    "model": "model",
    "kv_format": "engine.kv_format",
    "calibration": "engine.calibration",
    "tp": "engine.tp",
    "kvp": "engine.kvp",
    "kv_memory": "engine.kv_memory_bytes",
    "groups": "groups",
    "layout": "layout.mode",
    "ranks": "layout.ranks",
    "context": "engine.max_model_len",
    "host": "ingress.host",
    "port": "ingress.port",
    "http_port": "ingress.http_port",
    "ingress": "ingress.replicas",
    "auth": "auth.mode",
    "address": "ray.address",
}


_setting = functools.partial(typer.Option, rich_help_panel="Settings")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Settings of any cluster, from all sources."""

    config: Annotated[Path | None, _setting(help="A YAML file; see `kvmesh config`.")] = None
    sets: Annotated[
        list[str] | None,
        _setting(
            "--set",
            metavar="SETTING=VALUE",
            help="Any setting, e.g. engine.max_num_seqs=32; may be repeated. Overrides the "
            "environment (KVMESH_ENGINE__MAX_NUM_SEQS), which overrides the file.",
        ),
    ] = None
    model: Annotated[
        str | None,
        _setting(help="A local Hugging Face directory, a GGUF file, or a hub name (model)."),
    ] = None
    kv_format: Annotated[
        str | None,
        _setting(help="KV format, e.g. int8, k4v4 or exact (engine.kv_format)."),
    ] = None
    calibration: Annotated[
        str | None,
        _setting(help="A file of `kvmesh calibrate`, for calibrated formats (engine.calibration)."),
    ] = None
    tp: Annotated[
        int | None,
        _setting(help="Shares of the heads, each on ranks of its own (engine.tp)."),
    ] = None
    kvp: Annotated[
        int | None,
        _setting(help="Ranks among which a sequence's pages are dealt (engine.kvp)."),
    ] = None

    def load(self, path: Path | None = None) -> LoadedConfig:
        """All settings, from `path` (default: --config), the environment, --set and flags.

        Raises ConfigError.
        """
        from kvmesh.cluster.config_sources import load

        return load(
            path or self.config,
            environ=os.environ,
            sets=self.sets or (),
            flags=[
                (f"--{field.replace('_', '-')}", setting, getattr(self, field, None))
                for field, setting in FLAGS.items()
            ],
        )

    @property
    def given(self) -> bool:
        """Whether any option names a file or a setting."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return any(value not in (None, []) for value in values)


@dataclass(frozen=True, slots=True)
class ServeSettings(ModelSettings):
    """Settings of a cluster that serves."""

    groups: Annotated[
        int | None,
        _setting(help="Engine groups (groups)."),
    ] = None
    layout: Annotated[
        str | None,
        _setting(help="auto chooses tp, kvp and groups that are not set (layout.mode)."),
    ] = None
    ranks: Annotated[
        int | None,
        _setting(help="GPUs, or ranks on CPUs, that --layout auto divides (layout.ranks)."),
    ] = None
    context: Annotated[
        str | None,
        _setting(help="Maximum tokens of a sequence, e.g. 128k or 1M (engine.max_model_len)."),
    ] = None
    kv_memory: Annotated[
        str | None,
        _setting(help="KV memory of one rank, e.g. 512MiB (engine.kv_memory_bytes)."),
    ] = None
    host: Annotated[
        str | None,
        _setting(help="Address to listen on (ingress.host)."),
    ] = None
    port: Annotated[
        int | None,
        _setting(help="gRPC port; 0: any free one (ingress.port)."),
    ] = None
    http_port: Annotated[
        int | None,
        _setting(help="Port of OpenAI's API; 0: any free one (ingress.http_port)."),
    ] = None
    ingress: Annotated[
        int | None,
        _setting(help="Ingress processes (ingress.replicas)."),
    ] = None
    auth: Annotated[
        str | None,
        _setting(help="api_key, or none to accept requests from anyone (auth.mode)."),
    ] = None
    address: Annotated[
        str | None,
        _setting(help="A running Ray cluster to join, e.g. auto (ray.address)."),
    ] = None
