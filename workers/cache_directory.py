"""Where this machine keeps what can be made again: models, compiled loops, probes.

<cache>/models/    converted models (workers/model/store.py)
<cache>/numba/     compiled loops (kernels/attention/numba_cache.py)
<cache>/probes/    what KV formats do to models (workers/evaluation/probe_cache.py)
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
    """Let Numba load and store compiled loops on disk, unless the user has chosen a directory.

    Numba reads this when it is imported: call it before, at the start of a process.
    """
    environ.setdefault("NUMBA_CACHE_DIR", str(cache_directory() / "numba"))
