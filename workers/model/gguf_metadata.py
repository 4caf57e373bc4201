"""The metadata of a GGUF file, and which of it has been read. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvmesh.workers.errors import ConfigError, UnsupportedModelError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # types of tokens
# Tokens that end a turn. Converters often name only one in the metadata, so llama.cpp also looks
# for them by their texts: these, of the architectures here. It also takes </s>, but to Gemma that
# is ordinary text, and files of other models name it.
_ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<EOT>",
        "<eos>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)

# Values that say nothing.
_NEUTRAL: tuple[object, ...] = (None, 0, 0.0, False, "", "none", [])


class GGUFMetadata:
    """A GGUF file's keys and small tensors, and which of them have been read.

    values: of the metadata, by full name
    shapes: of all tensors, in torch's order; factors: tensors of RoPE's factors
    """

    def __init__(
        self,
        file: Path,
        values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        factors: Mapping[str, np.ndarray],
    ) -> None:
        self._file = file
        self.architecture = str(values.get("general.architecture"))
        prefix = f"{self.architecture}."
        self._values = {
            name.removeprefix(prefix): value
            for name, value in values.items()
            if name.startswith(prefix)
        }
        self._unread = {name for name, value in self._values.items() if value not in _NEUTRAL}
        self._all_values = values
        self.shapes = shapes
        self.factors = dict(factors)

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a key; it has been read."""
        self._unread.discard(name)
        return self._values.get(name, default)

    def number(self, name: str, default: int | None = None) -> int:
        """A positive integer. Raises ConfigError if the file has none."""
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(
                "model",
                f"{self._file}: {self.architecture}.{name} must be a positive integer,"
                f" got {value!r}",
            )
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A positive number. Raises ConfigError if the file has none."""
        value = self.take(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise ConfigError(
                "model",
                f"{self._file}: {self.architecture}.{name} must be a positive number,"
                f" got {value!r}",
            )
        return float(value)

    def expect(self, name: str, expected: object, what: str) -> None:
        """Raises UnsupportedModelError if the key has another value."""
        value = self.take(name, expected)
        if value != expected:
            raise self.refused(
                f"{self.architecture}.{name} is {value}, but its {what} is {expected}"
            )

    def take_factors(self, name: str) -> list[float] | None:
        """RoPE's factors in the tensor `name`, if the file has it."""
        found = self.factors.pop(name, None)
        return None if found is None else [float(value) for value in found]

    def tokenizer(self, name: str) -> Any:
        """A value of the tokenizer, None if the file has none."""
        return self._all_values.get(f"tokenizer.ggml.{name}")

    def chat_templates(self) -> dict[str, str]:
        """By name: those besides the one that is used if a request names none."""
        first = "tokenizer.chat_template."
        values = self._all_values.items()
        return {key.removeprefix(first): text for key, text in values if key.startswith(first)}

    @property
    def tokens(self) -> list[str]:
        """All tokens as the file spells them, by id."""
        return self.tokenizer("tokens") or []

    def added_tokens(self) -> dict[int, bool]:
        """Ids of the tokens that are found in a text before it is split, and which are special."""
        found = {
            number: kind == _CONTROL
            for number, kind in enumerate(self._token_types)
            if kind in (_CONTROL, _USER_DEFINED)
        }
        named = (self.tokenizer(f"{name}_token_id") for name in ("bos", "unknown", "padding"))
        special = [*self.stop_tokens(), *(number for number in named if number is not None)]
        found |= dict.fromkeys(special, True)
        return {number: found[number] for number in sorted(found) if self.tokens[number]}

    def unused_tokens(self) -> set[int]:
        """Ids that are only there to make the vocabulary as wide as the model's."""
        kinds = enumerate(self._token_types)
        return {number for number, kind in kinds if kind == _UNUSED} - self.added_tokens().keys()

    @property
    def _token_types(self) -> list[int]:
        return self.tokenizer("token_type") or []

    def stop_tokens(self) -> list[int]:
        """Tokens that end a sequence or a turn."""
        ids = [self.tokenizer(f"{end}_token_id") for end in ("eos", "eot", "eom")]
        ids += self.tokenizer("eos_token_ids") or []  # as Ollama writes
        ids += [number for number, text in enumerate(self.tokens) if text in _ENDS]
        return [*dict.fromkeys(int(i) for i in ids if i is not None)]

    def check_all_read(self) -> None:
        """Raises UnsupportedModelError naming what would be lost in the conversion."""
        lost = sorted(f"{self.architecture}.{name}" for name in self._unread)
        lost += sorted(self.factors)
        if lost:
            raise self.refused(f"{', '.join(lost)} would be lost in the conversion")

    def refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            "model", f"{self._file}: {reason}; use its safetensors weights"
        )
