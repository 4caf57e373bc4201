"""Results of probes on disk, so that not every start measures the same model and formats.

<cache>/probes/<digest>.json    divergences in nats; a digest of everything they depend on
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from kvmesh.kernels.whole_file import write_whole
from kvmesh.workers.cache_directory import cache_directory

logger = logging.getLogger(__name__)


class ProbeCache:
    """The result of one measurement.

    inputs: everything that the result depends on, compared by repr
    """

    def __init__(self, inputs: object, directory: Path | None = None) -> None:
        name = hashlib.sha256(repr(inputs).encode()).hexdigest()
        self._file = (directory or cache_directory() / "probes") / f"{name}.json"

    def load(self) -> list[float] | None:
        """The divergences, or None if they are not stored or not readable."""
        try:
            return [float(nats) for nats in json.loads(self._file.read_bytes())]
        except (OSError, ValueError, TypeError):
            return None

    def store(self, kl_nats: list[float]) -> None:
        """Store the divergences. If that fails, the next start measures again."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(kl_nats).encode())
        except OSError as error:
            logger.info("cannot store the probe's result in %s: %s", self._file.parent, error)
