"""A generation's trace: its spans, whose trace it joins, and what it never contains."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from kvmesh.cluster.config import build
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import QuotaExceededError
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.telemetry.traces import (
    OFF,
    OpenTelemetryTraces,
    Traces,
    make_traces,
    note_headers,
)
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import ConfigError
from tests.cluster.machine import TENANT, Machine, machine
from tests.cluster.otlp import receiver
from tests.cluster.test_generation import PROMPT, fill_engine
from tests.workers.test_leader import MANY

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01")
UNSAMPLED = ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-00")


def request(max_tokens: int = 4, **params: Any) -> pb.GenerateRequest:
    params = {"temperature": 0.0, "ignore_eos": True, **params}
    return pb.GenerateRequest(
        request_id="my-request",
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT)),
        sampling_params=pb.SamplingParams(max_tokens=max_tokens, **params),
    )


async def run(built: Machine, sent: pb.GenerateRequest) -> None:
    async for _ in built.stream(sent):
        pass


class Seen:
    """Spans by name, in the order in which they ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.traces = OpenTelemetryTraces(provider, "letters")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self.spans]

    def root(self) -> ReadableSpan:
        (found,) = [x for x in self.spans if x.name == "text_completion letters"]
        return found


@asynccontextmanager
async def traced(traces: Traces, **options: Any) -> AsyncIterator[Machine]:
    async with machine(**options) as built:
        built.ingress._traces = traces
        yield built


async def test_one_trace_from_the_caller_to_the_last_token() -> None:
    seen = Seen()
    async with traced(seen.traces) as built:
        built.allow(MANY)
        note_headers((("authorization", "Bearer secret"), CALLER))
        await run(built, request(seed=7, top_k=3))
        note_headers(None)
    assert seen.names() == ["tokenize", "place", "prefill", "decode", "text_completion letters"]
    root = seen.root()
    assert {f"{x.context.trace_id:032x}" for x in seen.spans if x.context} == {TRACE_ID}
    assert root.parent is not None and f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
    for span in seen.spans[:-1]:
        assert span.parent == root.context
    attributes = dict(root.attributes or {})
    assert {name: attributes[name] for name in attributes if name.startswith("gen_ai")} == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "kvmesh",
        "gen_ai.request.model": "letters",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.top_k": 3,
        "gen_ai.response.id": "my-request",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": attributes["gen_ai.response.time_to_first_chunk"],
        "gen_ai.usage.input_tokens": len(PROMPT),
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert attributes["kvmesh.group"] == "g0" and attributes["kvmesh.tenant"] == TENANT
    assert root.status.status_code is StatusCode.UNSET
    ends = [(x.start_time or 0, x.end_time or 0) for x in seen.spans[:-1]]
    assert all(a <= b for a, b in ends)
    assert [end for _, end in ends[:-1]] <= [start for start, _ in ends[1:]]


async def test_waiting_is_a_span() -> None:
    seen = Seen()
    async with traced(seen.traces) as built:
        holders = await fill_engine(built)
        waiting = asyncio.ensure_future(run(built, request()))
        await built.until(lambda: built.router.status().router.queue_depth == 1)
        built.allow(MANY)
        for holder in holders:
            await holder.aclose()
        await waiting
    (waited,) = [span for span in seen.spans if span.name == "queue"]
    assert next(event.name for event in waited.events) == "waiting"


async def test_a_lost_engine_is_seen() -> None:
    seen = Seen()
    async with traced(seen.traces, groups=2) as built:
        running = asyncio.ensure_future(run(built, request()))
        await built.until(lambda: any(engine.submitted for engine in built.engines.values()))
        (lost,) = [engine for engine in built.engines.values() if engine.submitted]
        lost.cut()
        built.allow(MANY)
        await running
    phases = ["tokenize", "place", "prefill", "place", "prefill", "decode"]
    assert seen.names()[:-1] == phases
    (event,) = seen.spans[2].events
    assert event.name == "engine lost" and dict(event.attributes or {}) == {
        "kvmesh.cause": "suspect"
    }
    assert dict(seen.root().attributes or {})["kvmesh.failovers"] == 1


async def test_a_refusal_is_an_error_with_its_reason() -> None:
    seen = Seen()
    config = RouterConfig(tenants={TENANT: TenantPolicy(quota_bytes=1)})
    async with traced(seen.traces, config=config) as built:
        with pytest.raises(QuotaExceededError):
            await run(built, request())
    assert seen.names() == ["tokenize", "place", "text_completion letters"]
    root = seen.root()
    assert root.status.status_code is StatusCode.ERROR
    assert dict(root.attributes or {})["error.type"] == "quota"


async def test_a_client_that_leaves_ends_its_trace() -> None:
    seen = Seen()
    async with traced(seen.traces) as built:
        stream = built.stream(request(50))
        built.allow(2)
        await anext(stream)
        await stream.aclose()
        built.allow(MANY)
    assert dict(seen.root().attributes or {})["error.type"] == "cancelled"


@pytest.mark.parametrize("seed", [(1 << 63) - 1, (1 << 64) - 1])
async def test_hostile_values_are_harmless(seed: int) -> None:
    seen = Seen()
    async with traced(seen.traces) as built:
        built.allow(MANY)
        sent = request(seed=seed)
        sent.request_id = "x" * 100_000
        note_headers((("traceparent", "x" * 10_000), ("tracestate", "\x00")))
        with pytest.raises(Exception, match="request_id"):
            await run(built, sent)
        note_headers(None)
    attributes = dict(seen.root().attributes or {})
    assert len(str(attributes["gen_ai.response.id"])) <= 128
    assert ("gen_ai.request.seed" in attributes) == (seed < 1 << 63)


async def test_spans_contain_no_text_and_no_key() -> None:
    seen = Seen()
    async with traced(seen.traces) as built:
        built.allow(MANY)
        sent = request(stop=["SECRETSTOP"])
        sent.prompt.text = "SECRETPROMPT"
        note_headers((("authorization", "Bearer SECRETKEY"), CALLER))
        await run(built, sent)
        note_headers(None)
    written = "".join(span.to_json() for span in seen.spans)
    assert "SECRET" not in written and len(seen.spans) == 5


# Export


async def test_traces_are_exported_by_otlp() -> None:
    with receiver() as (endpoint, batches):
        traces = make_traces(endpoint, 0.0, "letters", "1.2.3")
        async with traced(traces) as built:
            built.allow(MANY)
            for headers in ((CALLER,), (UNSAMPLED,), ()):
                note_headers(headers)
                await run(built, request())
            note_headers(None)
        # Stopping the ingress has exported them.
        assert batches
    resources = [x for batch in batches for x in batch.resource_spans]
    (service,) = {
        attribute.value.string_value
        for x in resources
        for attribute in x.resource.attributes
        if attribute.key == "service.name"
    }
    assert service == "kvmesh"
    spans = [span for x in resources for scope in x.scope_spans for span in scope.spans]
    # At a ratio of 0, only the trace that its caller samples.
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID} and len(spans) == 5


def test_off_by_default() -> None:
    assert make_traces(build({}).traces.endpoint, 1.0, "m", "v") is OFF


def test_nothing_of_opentelemetrys_sdk_is_loaded_while_off() -> None:
    code = (
        "import sys; from kvmesh.cluster.telemetry.traces import make_traces; "
        "make_traces(None, 1.0, 'm', 'v'); "
        "sys.exit(any(x.startswith('opentelemetry') for x in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://x:1", "http://x:1/v1/traces"])
def test_a_wrong_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"traces": {"endpoint": endpoint}})
    assert caught.value.field == "traces.endpoint"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"kvmesh\[traces\]") as caught:
        make_traces("http://x:1", 1.0, "m", "v")
    assert caught.value.field == "traces.endpoint"
