"""The directory for files that can be recreated: models, compiled loops, probe results.

<cache>/models/    converted models (workers/model/store.py)
<cache>/numba/     compiled loops (kernels/numba_cache.py)
<cache>/triton/    kernels that Triton has compiled
<cache>/probes/    results of probes (workers/scoring/probe_cache.py)
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/kvmesh, by default ~/.cache/kvmesh."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvmesh"


def keep_compiled_loops(environ: MutableMapping[str, str]) -> None:
    """Keep compiled loops and kernels on disk: set NUMBA_CACHE_DIR and TRITON_CACHE_DIR unless the
    user has, for example to a volume that containers share.

    Call it at the start of a process, because both are read when their library is imported.
    """
    environ.setdefault("NUMBA_CACHE_DIR", str(cache_directory() / "numba"))
    environ.setdefault("TRITON_CACHE_DIR", str(cache_directory() / "triton"))
