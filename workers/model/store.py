"""The local store of converted models. An entry is complete or absent, never half written.

<root>/<key>/             the model's files, and kvmesh.json, its manifest
<root>/<key>.lock         held by the process that makes the entry
<root>/<key>.partial-*    in progress; renamed when complete, removed when stale
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from kvmesh.workers.cache_directory import cache_directory
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import NAME_FILE

# To be raised when entries are made otherwise, so that those of an older version are made again.
_MANIFEST_VERSION = 4
_DIGESTED_BYTES = 16 << 20  # larger files are checked only by their size


def default_root() -> Path:
    """Where converted models are kept on this machine."""
    return cache_directory() / "models"


def installed_root() -> Path:
    """Where models are that came with this Python environment, as in an image; only read."""
    return Path(sys.prefix) / "share" / "kvmesh" / "models"


class ModelStore:
    """Model directories under `root`; each is made once, even if several processes ask for it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> Path | None:
        """The entry's directory if it exists and is intact."""
        entry = self.root / key
        return entry if _is_whole(entry) else None

    def make(self, key: str, name: str, fill: Callable[[Path], None], needed_bytes: int) -> Path:
        """The entry's directory; if it does not exist, `fill` writes it in a temporary directory.

        needed_bytes: upper bound of what `fill` writes
        Raises ConfigError if the disk is full or not writable; exceptions of `fill`
        are passed on. In both cases nothing is left behind.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f"{key}.lock"):
                return self.get(key) or self._fill(key, name, fill, needed_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
                raise ConfigError(
                    "model", f"{name} cannot be stored in {self.root}: {error.strerror}"
                ) from error
            raise

    def _fill(self, key: str, name: str, fill: Callable[[Path], None], needed_bytes: int) -> Path:
        for stale in self.root.glob(f"{key}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            raise ConfigError(
                "model",
                f"{name} needs {needed_bytes:,} bytes in {self.root}, but only {free:,} are free",
            )
        partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=self.root))
        try:
            fill(partial)
            _write_manifest(partial, name)
            _open_to_readers(partial)
            entry = self.root / key
            shutil.rmtree(entry, ignore_errors=True)
            partial.rename(entry)
            return entry
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _open_to_readers(path: Path) -> None:
    """Let every user read it: those of an image and of a volume may be others."""
    for file in path.iterdir():
        file.chmod(0o644)
    path.chmod(0o755)


def _write_manifest(path: Path, name: str) -> None:
    files = {}
    for file in sorted(path.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    manifest = {"version": _MANIFEST_VERSION, "name": name, "files": files}
    (path / NAME_FILE).write_text(json.dumps(manifest, indent=1))


def _is_whole(path: Path) -> bool:
    """Whether every file in the manifest has its size, and small files also their digest."""
    try:
        manifest = json.loads((path / NAME_FILE).read_bytes())
        return manifest["version"] == _MANIFEST_VERSION and all(
            (path / name).stat().st_size == entry["bytes"]
            and _digest(path / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _digest(file: Path) -> str | None:
    if file.stat().st_size > _DIGESTED_BYTES:
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()
