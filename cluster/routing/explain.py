"""A decision in words: what became of a request, and why, group by group."""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.cluster.routing.verdict import Verdict

MIB = 1 << 20


def explain(outcome: str, verdicts: Iterable[Verdict]) -> list[str]:
    """Lines for a log: the outcome first, then every group."""
    return [outcome, *(_group(verdict) for verdict in verdicts)]


def _group(verdict: Verdict) -> str:
    there, all_of_it = verdict.available_bytes / MIB, verdict.capacity_bytes / MIB
    parts = [
        f"needs {verdict.needed_bytes / MIB:,.1f} MiB",
        f"{there:,.1f} of {all_of_it:,.1f} MiB are there",
    ]
    if verdict.cached_pages:
        parts.append(f"holds {verdict.cached_pages} pages of its prompt")
    if verdict.cost_s is not None:
        parts.append(f"cost {verdict.cost_s:.3f} s")
    return f"  {verdict.group}: {verdict.reason.value} ({'; '.join(parts)})"
