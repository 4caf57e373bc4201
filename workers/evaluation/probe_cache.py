"""What probes found, kept on disk: the same model and formats are not measured at every start.

<cache>/probes/<digest>.json    the figures, under a digest of everything they follow from
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
    """One measurement, by everything its figures depend on.

    facts: repr tells them apart
    """

    def __init__(self, facts: object, directory: Path | None = None) -> None:
        name = hashlib.sha256(repr(facts).encode()).hexdigest()
        self._file = (directory or cache_directory() / "probes") / f"{name}.json"

    def load(self) -> list[float] | None:
        """The figures, or None if they are not there or not readable."""
        try:
            figures = json.loads(self._file.read_bytes())
            return [float(figure) for figure in figures]
        except (OSError, ValueError, TypeError):
            return None

    def store(self, kl_nats: list[float]) -> None:
        """Keep the figures; where that fails they are measured again next time."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(kl_nats).encode())
        except OSError as error:
            logger.info("the probe's figures are not kept in %s: %s", self._file.parent, error)
