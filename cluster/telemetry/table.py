"""Every metric of kvmesh. Meters, docs/metrics.md, dashboards and alerts are made from this table
or checked against it.

Names follow Prometheus' conventions: base units, the unit at the end, `_total` for counters. Ray's
exporter puts `ray_` in front of them, and adds the labels in RAY_LABELS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

PREFIX = "ray_"
# Of Ray and Ray Serve, on every metric here. A replica's id ends with its life.
RAY_LABELS = (
    "Component",
    "JobId",
    "NodeAddress",
    "SessionName",
    "Version",
    "WorkerId",
    "application",
    "deployment",
    "otel_scope_name",
    "otel_scope_schema_url",
    "otel_scope_version",
    "replica",
)


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, of one part of the cluster: ingress, router or engine.

    unit: what its values are, as the name says it; "" if they count things
    labels: with their meaning, or their values where these are few
    buckets: upper bounds, of a histogram
    """

    name: str
    kind: Kind
    part: str
    help: str
    unit: str = ""
    labels: Mapping[str, str] | None = None
    buckets: tuple[float, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.labels or ())

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return PREFIX + self.name

    @property
    def samples(self) -> tuple[str, ...]:
        """The names of its time series in Prometheus."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.exported}_{part}" for part in ("bucket", "sum", "count"))
        return (self.exported,)


# Up to half an hour: a prompt of a million tokens, or a long wait, takes minutes.
REQUEST_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0),
)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
DECISION_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1.0)

GROUP = {"group": "the group's name"}
TENANT = {"tenant": "of `metrics.tenants`; `other` for all others"}
REASON = {"reason": "an ErrorReason of the wire contract, in lower case"}
COUNTER, GAUGE, HISTOGRAM = Kind

# Ingress

REQUESTS = Metric(
    "kvmesh_requests_total",
    COUNTER,
    "ingress",
    "Calls that have ended",
    labels={
        "method": "of the wire contract, or the path of OpenAI's API",
        "outcome": "`ok`, `cancelled`, or the error's reason in lower case",
    },
)
OPEN_CALLS = Metric("kvmesh_ingress_open_calls", GAUGE, "ingress", "Calls that an ingress serves")
REQUEST_DURATION = Metric(
    "kvmesh_request_duration_seconds",
    HISTOGRAM,
    "ingress",
    "From a generation's arrival to its end",
    unit="seconds",
    labels=GROUP,
    buckets=REQUEST_BUCKETS_S,
)
REQUEST_QUEUE = Metric(
    "kvmesh_request_queue_seconds",
    HISTOGRAM,
    "ingress",
    "How long a generation waited for room and for its engine",
    unit="seconds",
    labels=GROUP,
    buckets=REQUEST_BUCKETS_S,
)
FIRST_TOKEN = Metric(
    "kvmesh_request_time_to_first_token_seconds",
    HISTOGRAM,
    "ingress",
    "From a generation's arrival to its first token (TTFT)",
    unit="seconds",
    labels=GROUP,
    buckets=REQUEST_BUCKETS_S,
)
OUTPUT_TOKEN = Metric(
    "kvmesh_request_time_per_output_token_seconds",
    HISTOGRAM,
    "ingress",
    "Mean time between two tokens of a generation's longest choice, failovers included (TPOT)",
    unit="seconds",
    labels=GROUP,
    buckets=TOKEN_BUCKETS_S,
)
FAILOVERS = Metric(
    "kvmesh_failovers_total",
    COUNTER,
    "ingress",
    "Generations that lost the engine of this group",
    labels={
        **GROUP,
        "cause": "`suspect`: the engine failed, perhaps because of this request; `cleared`: it "
        "failed for another reason, or drains; `refused`: it was gone before it had the request",
    },
)
QUARANTINES = Metric(
    "kvmesh_quarantined_requests_total",
    COUNTER,
    "ingress",
    "Generations placed on this group under suspicion, which run with no other suspect in a step",
    labels=GROUP,
)
TENANT_REQUESTS = Metric(
    "kvmesh_tenant_requests_total",
    COUNTER,
    "ingress",
    "Calls of a tenant that have ended",
    labels={**TENANT, "outcome": "as of `kvmesh_requests_total`"},
)
TENANT_TOKENS = Metric(
    "kvmesh_tenant_tokens_total",
    COUNTER,
    "ingress",
    "Tokens of a tenant's generations that have ended",
    labels={**TENANT, "direction": "`prompt` or `completion`"},
)
ROUTER_CONNECTED = Metric(
    "kvmesh_router_connected",
    GAUGE,
    "ingress, engine",
    "1 if a process is connected to the router, 0 if it cannot be reached or its certificate is "
    "that of another deployment",
    labels={"process": "`ingress`, or the group's name"},
)

KEYS_CURRENT = Metric(
    "kvmesh_api_keys_current",
    GAUGE,
    "ingress",
    "1 if the files in `auth.key_directory` could be used when they were last read, 0 if the keys "
    "from before are in use; always 1 without that setting",
)

# Router

GROUP_UP = Metric(
    "kvmesh_group_up",
    GAUGE,
    "router",
    "1 if the engine of a configured group is connected, else 0",
    labels=GROUP,
)
GROUP_WANTED = Metric(
    "kvmesh_group_wanted",
    GAUGE,
    "router",
    "1 if a configured group is to run, 0 if the autoscaler has stopped it",
    labels=GROUP,
)
QUEUE_REQUESTS = Metric(
    "kvmesh_router_queue_requests", GAUGE, "router", "Generations that wait for room"
)
OLDEST_WAIT = Metric(
    "kvmesh_router_oldest_wait_seconds",
    GAUGE,
    "router",
    "How long the one that has waited longest has waited",
    unit="seconds",
)
DECISION = Metric(
    "kvmesh_router_decision_seconds",
    HISTOGRAM,
    "router",
    "The router's work to place, queue or refuse a generation",
    unit="seconds",
    buckets=DECISION_BUCKETS_S,
)
LEASES = Metric("kvmesh_router_leases", GAUGE, "router", "Live leases")
LEASE_EVENTS = Metric(
    "kvmesh_router_lease_events_total",
    COUNTER,
    "router",
    "What happened to leases",
    labels={"event": "`granted`, `released`, or `expired`: no engine had it in time"},
)
LEDGER = Metric(
    "kvmesh_ledger_bytes",
    GAUGE,
    "router",
    "KV memory of a group in the ledger, over all ranks",
    unit="bytes",
    labels={**GROUP, "state": "`leased` or `free`"},
)
AUDITS = Metric(
    "kvmesh_ledger_audits_total",
    COUNTER,
    "router",
    "Comparisons of engines' reports with the ledger",
    labels={"result": "`agree` or `differ`"},
)
REFUSALS = Metric(
    "kvmesh_router_refusals_total",
    COUNTER,
    "router",
    "Generations that the router refused",
    labels=REASON,
)
REFUSED_BYTES = Metric(
    "kvmesh_router_refused_bytes_total",
    COUNTER,
    "router",
    "KV memory that refused generations asked for",
    unit="bytes",
    labels=REASON,
)
TENANT_BYTES = Metric(
    "kvmesh_tenant_leased_bytes",
    GAUGE,
    "router",
    "KV memory that is leased to a tenant",
    unit="bytes",
    labels=TENANT,
)
TENANT_LIVE = Metric(
    "kvmesh_tenant_live_requests",
    GAUGE,
    "router",
    "Generations of a tenant",
    labels={**TENANT, "state": "`queued` or `running`"},
)

# Engine

GROUP_INFO = Metric(
    "kvmesh_group_info",
    GAUGE,
    "engine",
    "What a group is made of; its value is always 1",
    labels={
        **GROUP,
        "model": "as served",
        "kv_format": "of sealed pages",
        "dtype": "of weights and hot pages",
        "tp": "shares of the heads",
        "kvp": "ranks to which a sequence's pages are dealt",
    },
)
DIVERGENCE = Metric(
    "kvmesh_group_divergence_nats",
    GAUGE,
    "engine",
    "Divergence of the group's KV format from exact KV on the probe's text, measured at its start; "
    "absent with `kv_probe: off` and for `exact`",
    unit="nats",
    labels=GROUP,
)
PROMPT_TOKENS = Metric(
    "kvmesh_prompt_tokens_total", COUNTER, "engine", "Tokens of prompts accepted", labels=GROUP
)
CACHED_TOKENS = Metric(
    "kvmesh_cached_tokens_total",
    COUNTER,
    "engine",
    "Tokens of prompts found in the prefix cache",
    labels=GROUP,
)
COMPLETION_TOKENS = Metric(
    "kvmesh_completion_tokens_total", COUNTER, "engine", "Tokens generated", labels=GROUP
)
COMPUTED_TOKENS = Metric(
    "kvmesh_computed_tokens_total",
    COUNTER,
    "engine",
    "Tokens that steps have computed, those of preempted sequences again",
    labels={**GROUP, "phase": "`prefill` or `decode`"},
)
PREFILL_LEFT = Metric(
    "kvmesh_prefill_remaining_tokens",
    GAUGE,
    "engine",
    "Tokens of live sequences to compute before their next one is sampled",
    labels=GROUP,
)
SEQUENCES = Metric(
    "kvmesh_sequences_total",
    COUNTER,
    "engine",
    "Sequences that have ended",
    labels={
        **GROUP,
        "outcome": "`stop`, `length`, `abort`, `deadline` or `fault`; `cleared`: it continues on "
        "another group, because this one drains",
    },
)
LIVE_SEQUENCES = Metric(
    "kvmesh_live_sequences",
    GAUGE,
    "engine",
    "Sequences of a group",
    labels={**GROUP, "state": "`running` or `waiting`"},
)
SEQUENCE_QUEUE = Metric(
    "kvmesh_sequence_queue_seconds",
    HISTOGRAM,
    "engine",
    "From submission to an engine to the first step",
    unit="seconds",
    labels=GROUP,
    buckets=REQUEST_BUCKETS_S,
)
SEQUENCE_PREFILL = Metric(
    "kvmesh_sequence_prefill_seconds",
    HISTOGRAM,
    "engine",
    "From a sequence's first step to its first token",
    unit="seconds",
    labels=GROUP,
    buckets=REQUEST_BUCKETS_S,
)
INTER_TOKEN = Metric(
    "kvmesh_inter_token_seconds",
    HISTOGRAM,
    "engine",
    "Time between two consecutive tokens (ITL): one value per step, that of the sequence that "
    "waited longest",
    unit="seconds",
    labels=GROUP,
    buckets=TOKEN_BUCKETS_S,
)
STEP = Metric(
    "kvmesh_step_seconds",
    HISTOGRAM,
    "engine",
    "Parts of a step: what the CPU does around the model, and the model",
    unit="seconds",
    labels={**GROUP, "part": "`host` or `device`"},
    buckets=STEP_BUCKETS_S,
)
STEP_AGE = Metric(
    "kvmesh_step_age_seconds",
    GAUGE,
    "engine",
    "How long the current step has taken so far, 0 between two steps",
    unit="seconds",
    labels=GROUP,
)
PREEMPTIONS = Metric(
    "kvmesh_preemptions_total", COUNTER, "engine", "Sequences preempted", labels=GROUP
)
EXPERT_IMBALANCE = Metric(
    "kvmesh_expert_imbalance_ratio",
    GAUGE,
    "engine",
    "Tokens of a layer's busiest expert relative to the mean of its experts, over the last 64 "
    "steps and all layers; absent for models without experts",
    unit="ratio",
    labels=GROUP,
)
POOL_PAGES = Metric(
    "kvmesh_pool_pages",
    GAUGE,
    "engine",
    "Pages of one rank",
    labels={**GROUP, "arena": "`hot` or `sealed`", "state": "`used`, `cached` or `free`"},
)
PINNED_PAGES = Metric(
    "kvmesh_pinned_pages",
    GAUGE,
    "engine",
    "Pages of prompts that stay cached for a time (pin_s), over all ranks that share a sequence's "
    "pages; they are among the cached ones",
    labels=GROUP,
)
PINNED_EVICTIONS = Metric(
    "kvmesh_pinned_evictions_total",
    COUNTER,
    "engine",
    "Pinned pages that running requests needed all the same",
    labels=GROUP,
)
POOL_BYTES = Metric(
    "kvmesh_pool_bytes",
    GAUGE,
    "engine",
    "KV memory of a group's pages, over all ranks",
    unit="bytes",
    labels={**GROUP, "state": "`used`, `cached` or `free`"},
)
GPU_UTILIZATION = Metric(
    "kvmesh_gpu_utilization_ratio",
    GAUGE,
    "engine",
    "Share of time in which a rank's GPU ran a kernel, 0 to 1; absent if NVML does not say it",
    unit="ratio",
    labels={**GROUP, "rank": "0 to ranks - 1"},
)
GPU_MEMORY = Metric(
    "kvmesh_gpu_memory_bytes",
    GAUGE,
    "engine",
    "Memory of a rank's GPU; absent if NVML does not say it",
    unit="bytes",
    labels={**GROUP, "rank": "0 to ranks - 1", "state": "`used` or `free`"},
)

METRICS: tuple[Metric, ...] = tuple(x for x in list(globals().values()) if isinstance(x, Metric))
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
