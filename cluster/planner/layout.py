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

    @property
    def total(self) -> int:
        """GPUs of all groups."""
        return self.groups * self.ranks

    def __str__(self) -> str:
        group = f"tp {self.tp}" if self.kvp == 1 else f"tp {self.tp} kvp {self.kvp}"
        return group if self.groups == 1 else f"{self.groups} × {group}"


def layouts(sizes: ModelSizes, gpus: int) -> list[Layout]:
    """Every layout of that many GPUs, smallest groups first.

    Raises ConfigError naming `gpus` unless it is a power of two.
    """
    if gpus < 1 or gpus & (gpus - 1):
        raise ConfigError("gpus", f"must be a power of two, so that groups are equal; got {gpus}")
    return layouts_of(sizes, gpus)


def layouts_of(sizes: ModelSizes, ranks: int) -> list[Layout]:
    """Every layout of that many ranks in equal groups, smallest groups first."""
    widths, state = [sizes.kvp_width, *sizes.mlp_widths], sizes.state
    found = []
    for group in (n for n in range(1, ranks + 1) if ranks % n == 0):
        for tp in sizes.tp_choices:
            dealt = group % tp == 0 and all(width % group == 0 for width in widths)
            dealt = dealt and (state is None or state.divides_by(group))
            if dealt or group == tp:
                found.append(Layout(ranks // group, tp, group // tp))
    return sorted(found, key=lambda layout: (layout.ranks, layout.kvp))
