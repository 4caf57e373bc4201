"""Cuts a text into the windows of a calibration."""

from __future__ import annotations

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.tokenizer import Tokenizer


def windows_of(text: str, tokenizer: Tokenizer, samples: int, context: int) -> list[list[int]]:
    """`samples` windows of `context` tokens, spread evenly over the text, without overlap.

    Each begins the way the model expects a text to begin. Raises ConfigError naming
    `text` if it is too short.
    """
    plain = tokenizer.encode(text, add_special_tokens=False)
    opening = tokenizer.encode("", add_special_tokens=True)
    if tokenizer.bos_token_id is None or opening != [tokenizer.bos_token_id]:
        opening = []
    length = context - len(opening)
    if len(plain) < samples * length:
        most = len(plain) // length
        fewer = f"use at most {most} samples or" if most else "use"
        raise ConfigError(
            "text",
            f"has {len(plain)} tokens, too few for {samples} samples of {context}; {fewer} "
            "a longer text",
        )
    stride = (len(plain) - length) // max(1, samples - 1) if samples > 1 else 0
    starts = [index * stride for index in range(samples)]
    return [opening + plain[start : start + length] for start in starts]
