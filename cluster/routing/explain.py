"""An estimate in words: what would become of a request, and why, group by group."""

from __future__ import annotations

from kvmesh.cluster.routing.request import Estimate
from kvmesh.cluster.routing.verdict import Verdict

MIB = 1 << 20


def explain(estimate: Estimate) -> list[str]:
    """Lines for a terminal or a log: the outcome first, then every group."""
    return [_outcome(estimate), *(_group(verdict) for verdict in estimate.verdicts)]


def _outcome(estimate: Estimate) -> str:
    if not estimate.fits_ever:
        return f"{estimate.request_id} fits no group, however long it waits"
    if estimate.fits_now:
        return f"{estimate.request_id} would go to {estimate.group} at once"
    waiting = f"{estimate.queue_depth} requests wait"
    if estimate.projected_start_s is None:
        return f"{estimate.request_id} would wait; {waiting}, its start is not known"
    return (
        f"{estimate.request_id} would start in about {estimate.projected_start_s:.1f} s; {waiting}"
    )


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
