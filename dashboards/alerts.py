"""The alerts as a table, with what to do about each; Prometheus' rules are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dashboards.queries import NAME_LABEL, RELEASE_LABELS
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.table import Metric

QUEUE_OBJECTIVE_S = 60
FULL_SHARE = 0.95
HUNG_STEP_S = 60
# How long a release is missed that is gone, by fault or for good.
VANISHED_FOR = "1h"


@dataclass(frozen=True, slots=True)
class Alert:
    """hold: how long the expression must hold; summary, action: for the one who is called"""

    name: str
    expr: str
    hold: str
    severity: str
    summary: str
    action: str


_RELEASE = ", ".join(RELEASE_LABELS)


def _in_releases(agg: str, metric: Metric, *labels: str) -> str:
    return f"{agg} by ({', '.join((_RELEASE, *labels))}) ({metric.exported})"


def _vanished(metric: Metric) -> str:
    """Releases that had the metric and have it no longer; absent() sees only the last one go."""
    before = f'present_over_time({metric.exported}{{{NAME_LABEL}!=""}}[{VANISHED_FOR}])'
    return f"(max by ({_RELEASE}) ({before}) unless {_in_releases('max', metric)})"


def _grew(metric: Metric, matcher: str, window: str, by: str) -> str:
    """More than before, or there for the first time, which increase() does not see."""
    series = f"{metric.exported}{matcher}"
    labels = f"({_RELEASE}, {by})" if by else f"({_RELEASE})"
    return (
        f"(sum by {labels} (increase({series}[{window}])) > 0)"
        f" or (sum by {labels} ({series} unless {series} offset {window}) > 0)"
    )


_LEDGER = _in_releases("sum", table.LEDGER, "group")
_LEASED = f'sum by ({_RELEASE}, group) ({table.LEDGER.exported}{{state="leased"}})'
_QUEUE_BUCKETS = f"sum by ({_RELEASE}, le) (rate({table.REQUEST_QUEUE.exported}_bucket[10m]))"
_KEYS = f'{table.REQUESTS.exported}{{outcome=~"wrong_key|missing_key"}}'

ALERTS = (
    Alert(
        "KvmeshNoGroupUp",
        f"({_in_releases('max', table.GROUP_UP)} == 0)"
        f" or {_vanished(table.GROUP_UP)} or absent({table.GROUP_UP.exported})",
        "1m",
        "critical",
        "No group of kvmesh is up: no request can be served.",
        "Look at the engines in Serve's status (`serve status`, or Ray's dashboard): why do they "
        "not start? Without any series, the metrics are not scraped or the router is down; a "
        f"release that was removed on purpose is missed for {VANISHED_FOR}.",
    ),
    Alert(
        "KvmeshGroupDown",
        f"{_in_releases('max', table.GROUP_UP, 'group')}"
        f" < {_in_releases('max', table.GROUP_WANTED, 'group')}",
        "10m",
        "warning",
        "Group {{ $labels.group }} has been down for 10 minutes.",
        "See the logs of its engine in Ray's dashboard: memory, a GPU that is gone, a model that "
        "cannot be fetched. If Serve waits for room (`serve status`): has a node that many free "
        "GPUs, and may Ray's autoscaler add one?",
    ),
    Alert(
        "KvmeshQueueWaitHigh",
        f"({_in_releases('max', table.OLDEST_WAIT)} > {QUEUE_OBJECTIVE_S})"
        f" or (histogram_quantile(0.95, {_QUEUE_BUCKETS}) > {QUEUE_OBJECTIVE_S})",
        "5m",
        "warning",
        f"Requests wait for more than {QUEUE_OBJECTIVE_S} seconds for room.",
        "Add groups, use a smaller KV format, or give tenants quotas; the dashboard of the router "
        "shows how many bytes were refused.",
    ),
    Alert(
        "KvmeshLedgerDiffers",
        _grew(table.AUDITS, '{result="differ"}', "15m", ""),
        "0m",
        "critical",
        "An engine's report and the router's ledger disagree.",
        "A bug of kvmesh: the router's log says which leases differ. Report it with that line. "
        "Restarting the group puts the account right.",
    ),
    Alert(
        "KvmeshFailovers",
        _grew(table.FAILOVERS, '{cause!="cleared"}', "10m", "group"),
        "0m",
        "warning",
        "Requests have lost the engine of group {{ $labels.group }} and continue elsewhere.",
        "See why the engine failed: its last log lines, and the node's memory and GPUs.",
    ),
    Alert(
        "KvmeshKeysStale",
        f"{_in_releases('min', table.KEYS_CURRENT)} == 0",
        "5m",
        "warning",
        "An ingress cannot read the API keys again and uses those from before.",
        "Its log names the file and what is wrong with it: a key that is malformed, a mode that is "
        "open to everyone, a volume that is gone. A revoked key still works until then.",
    ),
    Alert(
        "KvmeshPoolNearlyFull",
        f"{_LEASED} / {_LEDGER} > {FULL_SHARE}",
        "30m",
        "warning",
        f"Over {FULL_SHARE:.0%} of the KV memory of group {{{{ $labels.group }}}} has been leased "
        "for 30 minutes.",
        "New requests wait. Add groups, or use a smaller KV format.",
    ),
    Alert(
        "KvmeshStepHangs",
        f"{_in_releases('max', table.STEP_AGE, 'group')} > {HUNG_STEP_S}",
        "0m",
        "critical",
        "A step of group {{ $labels.group }} has taken {{ $value | humanizeDuration }} so far.",
        "A rank hangs. With `engine.step_timeout_s` the group is replaced by itself; look at its "
        "GPUs (Xid errors, NVLink) and at the network between ranks.",
    ),
    Alert(
        "KvmeshRouterUnreachable",
        f"{_in_releases('min', table.ROUTER_CONNECTED, 'process')} == 0",
        "2m",
        "critical",
        "{{ $labels.process }} cannot reach the router.",
        "The router is down, a network policy is in the way, or the processes have certificates "
        "of two deployments: deploy the application again.",
    ),
    Alert(
        "KvmeshKeysRefused",
        f"sum by ({_RELEASE}) (rate({_KEYS}[10m]))"
        f" > 0.5 * sum by ({_RELEASE}) (rate({table.REQUESTS.exported}[10m]))",
        "10m",
        "warning",
        "More than half of all calls have no valid key.",
        "After a change of keys: are the new ones in `auth.keys`, and do clients have them?",
    ),
)


def rules() -> dict[str, Any]:
    """The spec of a PrometheusRule, which is also a file of Prometheus' rules."""
    return {
        "groups": [
            {
                "name": "kvmesh",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expr,
                        "for": alert.hold,
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "description": alert.action},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }
