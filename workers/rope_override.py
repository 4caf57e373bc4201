"""RoPE scaling that an operator chooses instead of the model's own. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvmesh.workers.quantities import Number, WholeNumber
from kvmesh.workers.settings import Settings


class RopeOverride(Settings):
    """Takes a model beyond the positions it was trained for. Its quality there is unknown."""

    type: Literal["linear", "ntk", "yarn"] = Field(
        description="linear: divide positions by the factor; ntk: raise RoPE's base so that the "
        "slowest pair turns slower by the factor; yarn: as in arXiv 2309.00071"
    )
    factor: Number = Field(
        gt=1, description="How many times the trained context is served: 4 for 32k → 128k"
    )
    trained_len: WholeNumber | None = Field(
        default=None,
        ge=1,
        description="Tokens of context the model was trained for; null: as its configuration says",
    )

    def positions(self, trained_len: int) -> tuple[int, int]:
        """Positions of training, and of service; trained_len: as the model's configuration says"""
        trained_len = self.trained_len or trained_len
        return trained_len, int(trained_len * self.factor)

    def __str__(self) -> str:
        return f"{self.type}, factor {self.factor:g}"
