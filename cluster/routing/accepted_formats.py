"""Which KV formats a request accepts."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.workers.loads import EngineInfo


@dataclass(frozen=True, slots=True)
class AcceptedFormats:
    """By name and by divergence; all of them, by default.

    A request carries it to its end, because groups come and go while it waits or runs.

    names: empty for all
    max_divergence_nats: None for any; a format that was not measured exceeds every other bound
    """

    names: frozenset[str] = frozenset()
    max_divergence_nats: float | None = None

    def why_not(self, info: EngineInfo) -> str:
        """Why a group's format is not accepted; empty if it is."""
        name, bound = info.kv_format, self.max_divergence_nats
        if self.names and name not in self.names:
            return f"its format {name} is not among those allowed"
        if bound is not None:
            measured = info.kv_divergence_nats
            if measured is None:
                return f"the divergence of its format {name} was not measured"
            if not measured <= bound:  # NaN, too
                return f"its format {name} diverges by {measured:g} nats"
        return ""


ANY_FORMAT = AcceptedFormats()
