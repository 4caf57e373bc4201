"""A model under evaluation: loaded once, run with several KV formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_of_model, get_format
from kvmesh.workers.calibration.file import Calibration
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.evaluation.footprint import Footprint
from kvmesh.workers.model.facts import ModelFacts, read_facts
from kvmesh.workers.model.source import Progress, resolve_model
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.rank import Rank
from kvmesh.workers.scoring.scorer import Scorer

EXACT = "exact"


def choose_formats(names: list[str]) -> list[KVFormat]:
    """The formats with those names, without duplicates; `exact` always comes first.

    Raises ConfigError(kv_format)."""
    try:
        formats = [get_format(name) for name in (EXACT, *names)]
    except ValueError as error:
        raise ConfigError("kv_format", str(error).removeprefix("kv format: ")) from None
    return list({fmt.name: fmt for fmt in formats}.values())


class EvaluatedModel:
    """config: for a single rank; its kv_format is not used
    calibrations: files of `kvmesh calibrate`, for formats that need one
    Raises the same errors as loading the model.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress | None = None,
        calibrations: Sequence[str] = (),
    ) -> None:
        assert config.tp == 1, "evaluation runs in one process"
        files = resolve_model(config.model, progress=progress, rope=config.rope)
        self.config = config
        self.name = files.name
        self.facts: ModelFacts = read_facts(files.path, config.rope)
        self.tokenizer = Tokenizer.load(files.path)
        self._calibrations = {Calibration.format_of(Path(path)): path for path in calibrations}
        self._rank = Rank(config, 0, Communicator.single())
        self.dtype = self._rank.describe().dtype

    def check_length(self, field: str, tokens: int) -> None:
        """Raise ConfigError(field) unless sequences may have that many tokens."""
        if not 2 <= tokens <= self.facts.max_model_len:
            raise ConfigError(
                field,
                f"takes {tokens} tokens; sequences of {self.name} may have from 2 to "
                f"{self.facts.max_model_len}",
            )

    def scorer(self, fmt: KVFormat, context: int) -> Scorer:
        """A scorer with its own pool for sequences of up to `context` tokens."""
        return Scorer(
            self._rank.with_format(fmt.name, self._calibrations.get(fmt.name)),
            page_size=self.config.page_size,
            context=context,
        )

    def footprint(self, fmt: KVFormat) -> Footprint:
        """Raises ConfigError(kv_format) if the format does not support the model."""
        try:
            return Footprint.of(
                format_of_model(fmt, self.facts.values_in_keys),
                page_size=self.config.page_size,
                num_layers=self.facts.num_kv_layers,
                num_kv_heads=self.facts.num_kv_heads,
                head_dim=self.facts.head_dim,
                sink_pages=self.config.sink_pages,
                recent_pages=self.config.recent_pages,
            )
        except ValueError as error:
            raise ConfigError("kv_format", f"{fmt.name}: {error}") from None
