"""How GPUs can be divided: into groups, and a group's into tp × kvp."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.sizes import ModelSizes


@dataclass(frozen=True, slots=True)
class Layout:
    """groups engines, each of tp ranks over heads times kvp ranks over pages."""

    groups: int
    tp: int
    kvp: int = 1

    @property
    def ranks(self) -> int:
        """GPUs of a group."""
        return self.tp * self.kvp

    def __str__(self) -> str:
        group = f"tp {self.tp}" if self.kvp == 1 else f"tp {self.tp} kvp {self.kvp}"
        return group if self.groups == 1 else f"{self.groups} × {group}"


def layouts(sizes: ModelSizes, gpus: int) -> list[Layout]:
    """Every layout of that many GPUs, smallest groups first.

    Raises ConfigError naming `gpus` unless it is a power of two.
    """
    if gpus < 1 or gpus & (gpus - 1):
        raise ConfigError("gpus", f"must be a power of two, so that groups are equal; got {gpus}")
    widths = [sizes.kvp_width, *sizes.mlp_widths]
    state = sizes.state
    found = []
    ranks = 1
    while ranks <= gpus:
        for tp in sizes.tp_choices:
            dealt = ranks % tp == 0 and all(width % ranks == 0 for width in widths)
            dealt = dealt and (state is None or state.divides_by(ranks))
            if dealt or ranks == tp:
                found.append(Layout(gpus // ranks, tp, ranks // tp))
        ranks *= 2
    return sorted(found, key=lambda layout: (layout.ranks, layout.kvp))
