"""Real text, cut into windows for evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.request import TokenIds


def read_text(path: Path) -> str:
    """The text in `path`; raises ConfigError(text)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError("text", f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError("text", f"cannot read {path}: {error.strerror}") from None


class TokenText:
    """A text as token ids.

    prefix: tokens that begin every sequence of the model (a BOS), and every window
    """

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.prefix = _ids(tokenizer.encode(""))
        self.ids = _ids(tokenizer.encode(text, add_special_tokens=False))

    def windows(self, context: int, count: int) -> list[TokenIds]:
        """Up to `count` windows of `context` tokens, prefix included, that do not overlap and
        are spread over the whole text. Raises ConfigError(text) if not even one fits."""
        size = context - len(self.prefix)
        available = len(self.ids) // size
        if not available:
            raise ConfigError(
                "text", f"must have at least one window of {context} tokens, got {len(self.ids)}"
            )
        count = min(count, available)
        starts = [index * available // count * size for index in range(count)]
        return [np.concatenate((self.prefix, self.ids[s : s + size])) for s in starts]


def _ids(values: list[int]) -> TokenIds:
    return np.array(values, dtype=np.int32)
