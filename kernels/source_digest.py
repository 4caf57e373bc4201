"""A digest of source code, to recognise files on disk that other code has made."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def source_digest(directory: Path) -> str:
    """SHA-256 of the names and contents of all Python files in `directory`, in hexadecimal."""
    digest = hashlib.sha256()
    for file in sorted(directory.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(directory)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
