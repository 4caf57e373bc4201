"""The dashboards as a table of panels. Expressions are made from the table of metrics, so that
renaming a metric renames it here."""

from __future__ import annotations

from dataclasses import dataclass

from dashboards.queries import Query, count, quantiles, rate, ratio, total, value
from kvmesh.cluster.telemetry import table
from kvmesh.cluster.telemetry.table import Metric


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    unit: as Grafana names it
    kind: of panel, as Grafana names it
    stacked: series are parts of a whole
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    help: str
    kind: str = "timeseries"
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """rows: panels by the title of their row; variables: labels to choose values of"""

    name: str
    title: str
    rows: dict[str, tuple[Panel, ...]]
    variables: tuple[str, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows.values() for panel in row)


def _latency(title: str, metric: Metric, by: str = "") -> Panel:
    return Panel(title, "s", quantiles(metric, by), metric.help)


FIRST_TOKEN = _latency("Time to first token", table.FIRST_TOKEN)
TOKENS = Panel(
    "Tokens",
    "short",
    (rate(table.PROMPT_TOKENS, legend="prompt"), rate(table.COMPLETION_TOKENS, legend="output")),
    "Per second, of prompts accepted and of output",
)
POOL_BYTES = Panel(
    "KV memory",
    "bytes",
    (value(table.POOL_BYTES, by="state"),),
    "Pages in use, cached for equal prefixes, and free",
    stacked=True,
)
LEDGER_SHARE = Panel(
    "KV memory leased",
    "percentunit",
    (
        ratio(
            value(table.LEDGER, by="group", state="leased"),
            value(table.LEDGER, by="group"),
            "group",
        ),
    ),
    "Share of each group that leases reserve; requests wait when a group is full",
)
QUEUE = Panel(
    "Waiting for room",
    "short",
    (count(table.QUEUE_REQUESTS, legend="requests"),),
    table.QUEUE_REQUESTS.help,
)
OLDEST = Panel(
    "Longest wait",
    "s",
    (value(table.OLDEST_WAIT, agg="max", legend="oldest"),),
    table.OLDEST_WAIT.help,
)
STEPS = _latency("Step, host and device", table.STEP, by="part")

FLEET = Dashboard(
    "fleet",
    "kvmesh: fleet",
    {
        "Now": (
            Panel(
                "Groups up",
                "short",
                (
                    count(table.GROUP_UP, of="group", legend="up"),
                    count(table.GROUP_WANTED, of="group", legend="wanted"),
                ),
                "And how many the autoscaler wants, or are configured without it",
                kind="stat",
            ),
            Panel(
                "Sequences",
                "short",
                (value(table.LIVE_SEQUENCES, by="state"),),
                "Running in a step, and waiting in an engine",
                kind="stat",
            ),
            Panel(
                "Calls open",
                "short",
                (value(table.OPEN_CALLS, legend="calls"),),
                table.OPEN_CALLS.help,
                kind="stat",
            ),
            Panel(
                "Prefix hits",
                "percentunit",
                (
                    ratio(
                        rate(table.CACHED_TOKENS),
                        rate(table.PROMPT_TOKENS),
                        "",
                        legend="hits",
                    ),
                ),
                "Share of prompt tokens found in prefix caches",
                kind="stat",
            ),
        ),
        "Traffic": (
            Panel(
                "Calls that ended",
                "reqps",
                (rate(table.REQUESTS, by="outcome"),),
                table.REQUESTS.help,
                stacked=True,
            ),
            TOKENS,
            Panel(
                "Sequences that ended",
                "reqps",
                (rate(table.SEQUENCES, by="outcome"),),
                table.SEQUENCES.help,
                stacked=True,
            ),
        ),
        "Latency": (
            FIRST_TOKEN,
            _latency("Time per output token", table.OUTPUT_TOKEN),
            _latency("Request duration", table.REQUEST_DURATION),
            _latency("Waiting", table.REQUEST_QUEUE),
        ),
        "KV memory": (POOL_BYTES, LEDGER_SHARE, QUEUE, OLDEST),
        "Trouble": (
            Panel(
                "Failovers",
                "short",
                (total(table.FAILOVERS, by="cause"),),
                "Since the start: generations that lost their engine, by why it failed",
            ),
            Panel(
                "Quarantined",
                "short",
                (total(table.QUARANTINES, by="group"),),
                "Since the start: " + table.QUARANTINES.help,
            ),
            Panel(
                "Preemptions",
                "short",
                (total(table.PREEMPTIONS, by="group"),),
                "Since the start: " + table.PREEMPTIONS.help,
            ),
            Panel(
                "Refused by the router",
                "reqps",
                (rate(table.REFUSALS, by="reason"),),
                table.REFUSALS.help,
                stacked=True,
            ),
        ),
    },
    variables=("group",),
)

GROUP = Dashboard(
    "group",
    "kvmesh: group",
    {
        "Group": (
            Panel(
                "Made of",
                "short",
                (
                    value(
                        table.GROUP_INFO,
                        agg="max",
                        by="group, model, kv_format, dtype, tp, kvp",
                        legend="{{group}}: {{model}}, {{kv_format}}, tp {{tp}} kvp {{kvp}}",
                    ),
                ),
                table.GROUP_INFO.help,
                kind="table",
            ),
            Panel(
                "Divergence from exact KV",
                "short",
                (value(table.DIVERGENCE, agg="max", by="group"),),
                table.DIVERGENCE.help,
                kind="stat",
            ),
            Panel(
                "Expert imbalance",
                "short",
                (value(table.EXPERT_IMBALANCE, agg="max", by="group"),),
                table.EXPERT_IMBALANCE.help,
                kind="stat",
            ),
        ),
        "Work": (
            Panel(
                "Live sequences",
                "short",
                (value(table.LIVE_SEQUENCES, by="group, state"),),
                table.LIVE_SEQUENCES.help,
            ),
            Panel(
                "Tokens computed",
                "short",
                (rate(table.COMPUTED_TOKENS, by="group, phase"),),
                "Per second: " + table.COMPUTED_TOKENS.help,
            ),
            Panel(
                "Prompts still to compute",
                "short",
                (value(table.PREFILL_LEFT, by="group"),),
                table.PREFILL_LEFT.help,
            ),
        ),
        "Latency": (
            _latency("Between two tokens", table.INTER_TOKEN, by="group"),
            _latency("Prefill", table.SEQUENCE_PREFILL, by="group"),
            _latency("Wait in the engine", table.SEQUENCE_QUEUE, by="group"),
        ),
        "Steps": (
            STEPS,
            Panel(
                "Steps",
                "ops",
                (rate(table.STEP, by="group", sample="count", part="device"),),
                "Per second",
            ),
            Panel(
                "Time in steps",
                "percentunit",
                (rate(table.STEP, by="group, part", sample="sum"),),
                "Share of time; what is missing to 1 the engine has nothing to do",
                stacked=True,
            ),
            Panel(
                "Age of the current step",
                "s",
                (value(table.STEP_AGE, agg="max", by="group"),),
                table.STEP_AGE.help,
            ),
        ),
        "Pages": (
            Panel(
                "Pages of one rank",
                "short",
                (value(table.POOL_PAGES, by="arena, state"),),
                table.POOL_PAGES.help,
            ),
            POOL_BYTES,
            Panel(
                "Pinned pages",
                "short",
                (value(table.PINNED_PAGES, by="group"),),
                table.PINNED_PAGES.help,
            ),
            Panel(
                "Pinned pages that were needed",
                "short",
                (total(table.PINNED_EVICTIONS, by="group"),),
                "Since the start: " + table.PINNED_EVICTIONS.help,
            ),
            Panel(
                "Preemptions",
                "short",
                (total(table.PREEMPTIONS, by="group"),),
                "Since the start: " + table.PREEMPTIONS.help,
            ),
        ),
        "GPUs": (
            Panel(
                "GPU utilisation",
                "percentunit",
                (value(table.GPU_UTILIZATION, agg="max", by="group, rank"),),
                table.GPU_UTILIZATION.help,
            ),
            Panel(
                "GPU memory",
                "bytes",
                (value(table.GPU_MEMORY, by="group, rank, state"),),
                table.GPU_MEMORY.help,
            ),
        ),
    },
    variables=("group",),
)

ROUTER = Dashboard(
    "router",
    "kvmesh: router and ledger",
    {
        "Queue": (QUEUE, OLDEST, _latency("Decision", table.DECISION)),
        "Ledger": (
            Panel(
                "Leased and free",
                "bytes",
                (value(table.LEDGER, by="group, state"),),
                table.LEDGER.help,
                stacked=True,
            ),
            LEDGER_SHARE,
            Panel(
                "Leases",
                "short",
                (count(table.LEASES, legend="leases"),),
                table.LEASES.help,
            ),
            Panel(
                "Leases granted and ended",
                "ops",
                (rate(table.LEASE_EVENTS, by="event"),),
                table.LEASE_EVENTS.help,
            ),
            Panel(
                "Audits",
                "ops",
                (rate(table.AUDITS, by="result"),),
                table.AUDITS.help + "; `differ` must stay at 0",
            ),
        ),
        "Refusals": (
            Panel(
                "Refused",
                "reqps",
                (rate(table.REFUSALS, by="reason"),),
                table.REFUSALS.help,
                stacked=True,
            ),
            Panel(
                "KV memory refused",
                "Bps",
                (rate(table.REFUSED_BYTES, by="reason"),),
                table.REFUSED_BYTES.help + ": what more groups would have held",
                stacked=True,
            ),
        ),
        "Connections": (
            Panel(
                "Groups",
                "short",
                (value(table.GROUP_UP, agg="max", by="group"),),
                table.GROUP_UP.help,
            ),
            Panel(
                "Groups up and wanted",
                "short",
                (
                    count(table.GROUP_UP, of="group", legend="up"),
                    count(table.GROUP_WANTED, of="group", legend="wanted"),
                ),
                table.GROUP_WANTED.help
                + ". A group that starts is wanted and not yet up; one that "
                "ends what it has is up and no longer wanted",
            ),
            Panel(
                "API keys current",
                "short",
                (value(table.KEYS_CURRENT, agg="min", legend="all ingresses"),),
                table.KEYS_CURRENT.help,
            ),
            Panel(
                "Connected to the router",
                "short",
                (value(table.ROUTER_CONNECTED, agg="min", by="process"),),
                table.ROUTER_CONNECTED.help,
            ),
        ),
    },
    variables=("group",),
)

TENANTS = Dashboard(
    "tenants",
    "kvmesh: tenants",
    {
        "Tenants, with `metrics.tenants`": (
            Panel(
                "Calls that ended",
                "reqps",
                (rate(table.TENANT_REQUESTS, by="tenant, outcome"),),
                table.TENANT_REQUESTS.help,
            ),
            Panel(
                "Tokens",
                "short",
                (rate(table.TENANT_TOKENS, by="tenant, direction"),),
                "Per second: " + table.TENANT_TOKENS.help,
            ),
            Panel(
                "KV memory leased",
                "bytes",
                (count(table.TENANT_BYTES, by="tenant"),),
                table.TENANT_BYTES.help,
                stacked=True,
            ),
            Panel(
                "Waiting and running",
                "short",
                (count(table.TENANT_LIVE, by="tenant, state"),),
                table.TENANT_LIVE.help,
            ),
        ),
    },
    variables=("tenant",),
)

DASHBOARDS = (FLEET, GROUP, ROUTER, TENANTS)
