"""The KV formats whose kernels are measured."""

from __future__ import annotations

from kvmesh.kernels.formats.registry import format_names

FORMATS = format_names(comparison=False)
