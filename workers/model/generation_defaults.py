"""What a model's generation_config.json says about sampling, for requests that say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvmesh.workers.errors import ConfigError, InvalidFieldError
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.facts import NAME_FILE, read_json
from kvmesh.workers.sampling_params import RANGES

FILE = "generation_config.json"
# The embedded model's own file, which its GGUF file does not contain.
_EMBEDDED = {"temperature": 0.2, "top_p": 0.9}
# Settings of transformers that change its output and that no request of kvmesh can make, with
# their neutral values.
_NOT_IMPLEMENTED: Mapping[str, tuple[object, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "top_h": (None,),
    "typical_p": (None, 1.0, 1),
    "watermarking_config": (None,),
}


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """Values of sampling parameters for requests that do not set them; None: SamplingParams's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def overridden_by(self, other: DefaultSampling) -> DefaultSampling:
        return DefaultSampling(**{**self.given(), **other.given()})


NEUTRAL = DefaultSampling()


def read_sampling_defaults(path: Path) -> DefaultSampling:
    """Those of the model in directory `path`.

    Raises ConfigError naming a value that is out of range, and how to do without the file.
    """
    values = _read(path)
    found: dict[str, Any] = {}
    for field in fields(DefaultSampling):
        value = values.get(field.name)
        if value is None:
            continue
        if field.name == "top_k" and value == -1:  # in some files for all tokens, like 0
            value = 0
        kind = int if field.name == "top_k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise _wrong(path, f"{field.name} must be a number, got {value!r:.60}")
        try:
            RANGES[field.name].check(field.name, value)
        except InvalidFieldError as error:
            raise _wrong(path, f"{field.name} {error.message}") from None
        found[field.name] = value
    if values.get("do_sample") is False:
        found["temperature"] = 0.0
    return DefaultSampling(**found)


def ignored_generation_settings(path: Path) -> tuple[str, ...]:
    """Settings of the file that would change transformers' output, and are not implemented."""
    values = _read(path)
    return tuple(
        name
        for name, neutral in _NOT_IMPLEMENTED.items()
        if name in values and values[name] not in neutral
    )


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path / FILE) if (path / FILE).exists() else {}
    if (path / NAME_FILE).exists() and read_json(path / NAME_FILE).get("name") == EMBEDDED_NAME:
        return {**_EMBEDDED, **values}
    return values


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError(
        "model", f"{path / FILE}: {what}; `generation.source: neutral` serves without its values"
    )
