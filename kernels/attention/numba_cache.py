"""Compiled loops, kept on disk where NUMBA_CACHE_DIR names a directory.

Numba has a cache of its own, which does not help here: it misses whenever a
function closes over another compiled one, as all loops do, and it does not
notice a change in another file. A loop's file is named by everything it was
made from, so a file never goes stale, and processes that write the same one
write the same bytes.

<NUMBA_CACHE_DIR>/kvmesh-loops/<digest>    SHA-256 of the rest, then a pickle
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import serialize
from numba.core.compiler import CompileResult

from kvmesh.kernels.source_digest import source_digest
from kvmesh.kernels.whole_file import write_whole

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size
_KERNELS = Path(__file__).parents[1]


def keep_on_disk(loop: Any, name: str) -> None:
    """Let `loop`, a Numba dispatcher that has compiled nothing yet, be loaded and stored.

    name: what tells this loop from others that the same sources make
    """
    if numba.config.CACHE_DIR:
        loop._cache = _LoopCache(Path(numba.config.CACHE_DIR) / "kvmesh-loops", name)


class _LoopCache:
    """The interface of Numba's own cache, as a dispatcher calls it. It never raises: what cannot
    be loaded is compiled, and what cannot be stored is compiled again next time."""

    def __init__(self, directory: Path, name: str) -> None:
        self.cache_path = str(directory)
        self._directory = directory
        self._name = name

    def load_overload(self, signature: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        try:
            stored = self._file(signature, target_context.codegen()).read_bytes()
        except OSError:
            return None
        digest, payload = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception as error:  # whatever is wrong with it, it can be compiled
            logger.warning("a compiled loop in %s cannot be used: %s", self._directory, error)
            return None

    def save_overload(self, signature: Any, result: CompileResult) -> None:
        if result.lifted or result.library.has_dynamic_globals:
            return  # it holds addresses of this process
        try:
            payload = serialize.dumps(result._reduce())
            self._directory.mkdir(parents=True, exist_ok=True)
            file = self._file(signature, result.codegen)
            write_whole(file, hashlib.sha256(payload).digest() + payload)
        except (OSError, pickle.PicklingError) as error:
            logger.info("a compiled loop is not kept in %s: %s", self._directory, error)

    def flush(self) -> None:
        """Nothing is held back, and files never go stale."""

    def _file(self, signature: Any, codegen: Any) -> Path:
        parts = (
            source_digest(_KERNELS),
            numba.__version__,
            llvmlite.__version__,
            sys.implementation.cache_tag,
            codegen.magic_tuple(),
            self._name,
            signature,
        )
        return self._directory / hashlib.sha256(repr(parts).encode()).hexdigest()
