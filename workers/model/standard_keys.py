"""A model's configuration in the keys that its text model has in most models. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmesh.workers.model.dbrx_keys import dbrx_in_standard_keys
from kvmesh.workers.model.text_part import text_config


def standard_keys(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The contents of a config.json of the model in directory `path`: of a checkpoint of several
    modalities its text model's, of DBRX by other names, and of all others as they are.

    Raises UnsupportedModelError for values that are not implemented.
    """
    return dbrx_in_standard_keys(text_config(config, path), path)
