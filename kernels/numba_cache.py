"""A cache on disk for compiled loops, if NUMBA_CACHE_DIR is set.

Numba's own cache does not work here: it misses if a function closes over another
compiled function, as all loops do, and it does not notice changes in other files.
Here the file's name is a digest of everything the loop depends on, so that a file
is never out of date, and processes that write the same file write the same code.

<NUMBA_CACHE_DIR>/kvmesh-loops/<digest>    SHA-256 of the pickle, then the pickle

Numba counts the functions that a process compiles, and their numbers are part of their symbols. A
loaded loop would call this process's function of the same name and number in place of its own, so
here every process counts from a number of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import pickle
import secrets
import sys
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import serialize
from numba.core.bytecode import FunctionIdentity
from numba.core.compiler import CompileResult

from kvmesh.kernels.source_digest import source_digest
from kvmesh.kernels.whole_file import write_whole

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size
_KERNELS = Path(__file__).parent


def _count_from_own_number() -> None:
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60))


_count_from_own_number()
os.register_at_fork(after_in_child=_count_from_own_number)
source_digest(_KERNELS)  # remembered now, since the files may be others when a loop is compiled


def keep_on_disk(loop: Any, name: str) -> None:
    """Load `loop` from disk, or store it there when it is compiled.

    loop: a Numba dispatcher that has not compiled anything yet
    name: distinguishes loops that are made by the same source code
    """
    directory: str = getattr(numba.config, "CACHE_DIR", "")  # numba has no annotations
    if directory:
        loop._cache = _LoopCache(Path(directory) / "kvmesh-loops", name)


class _LoopCache:
    """Has the interface of Numba's own cache, which the dispatcher calls.

    It never raises: a loop that cannot be loaded or stored is compiled in every process.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.cache_path = str(directory)
        self._directory = directory
        self._name = name

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """A CompileResult, or None."""
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
        except Exception as error:  # of any kind: the loop can always be compiled
            logger.warning("cannot load a compiled loop from %s: %s", self._directory, error)
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        if result.lifted or result.library.has_dynamic_globals:
            return  # it contains addresses of this process
        try:
            payload = serialize.dumps(result._reduce())
            self._directory.mkdir(parents=True, exist_ok=True)
            file = self._file(signature, result.codegen)
            write_whole(file, hashlib.sha256(payload).digest() + payload)
        except (OSError, pickle.PicklingError) as error:
            logger.info("cannot store a compiled loop in %s: %s", self._directory, error)

    def flush(self) -> None:
        """Nothing to do: files are never out of date."""

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
