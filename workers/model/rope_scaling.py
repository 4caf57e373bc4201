"""How a model's RoPE is scaled, as its config.json says. Torch-free.

Scaling that transformers chooses by the length of the sequence is fixed when a model is
loaded, so that a key never depends on what comes after it:

    dynamic   the model's own positions only, where it changes nothing
    longrope  the short factors if no sequence may be longer than the model was originally
              trained for, otherwise the long factors, for every sequence
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Other names of a type.
_ALIASES = {"su": "longrope"}
# In models that rotate layers with a sliding window differently, the others are scaled.
SCALED_LAYERS = "full_attention"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """kind: as in transformers ("default", "yarn", …); parameters: of the type, with its keys"""

    kind: str
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RopeScaling:
        """From the keys of transformers 5 or of older versions."""
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            return cls(repr(parameters), {})
        if SCALED_LAYERS in parameters:
            parameters = parameters[SCALED_LAYERS] or {}
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        return cls(_ALIASES.get(kind, kind), parameters)

    def max_model_len(self, config: Mapping[str, Any]) -> int:
        """Positions that the model supports, without attention in two chunks."""
        positions = _positions(config)
        original = self.parameters.get("original_max_position_embeddings")
        if self.kind == "yarn" and original:
            return max(positions, _positions(config, int(original * self.parameters["factor"])))
        return positions

    def trained_len(self, config: Mapping[str, Any]) -> int:
        """Positions that the model was trained for before its RoPE was scaled."""
        original = self.parameters.get("original_max_position_embeddings")
        original = original or config.get("original_max_position_embeddings")
        return _positions(config, int(original or config["max_position_embeddings"]))

    def __str__(self) -> str:
        factor = self.parameters.get("factor")
        return f"{self.kind}, factor {factor:g}" if factor else self.kind


def _positions(config: Mapping[str, Any], positions: int | None = None) -> int:
    """Of `positions`, by default those of the configuration, how many plain attention has."""
    positions = positions or int(config["max_position_embeddings"])
    chunks = config.get("dual_chunk_attention_config")
    if not chunks:
        return positions
    # Within the first chunk it is plain attention (arXiv 2402.17463).
    return min(positions, int(chunks["chunk_size"]) - int(chunks["local_size"]))
