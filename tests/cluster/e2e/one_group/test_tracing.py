"""A caller's trace goes through the SDK, or over HTTP, and a cluster to a collector."""

from __future__ import annotations

import itertools
from urllib.request import Request, urlopen

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import use_span

from kvmesh.client import Client
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import wait_for
from tests.cluster.otlp import Batch

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # of an HTTP client


def test_a_trace_from_the_caller_to_the_collector(
    endpoint: Endpoint, client: Client, traces: tuple[str, list[Batch]]
) -> None:
    """And nothing else: an ingress exports its spans in order, so others would have arrived."""
    span = TracerProvider().get_tracer("caller").start_span("ask")
    client.generate("not traced", max_tokens=2)
    with use_span(span, end_on_exit=True):
        client.generate("Once upon a time", max_tokens=4)
    headers = {"authorization": f"Bearer {endpoint.api_key}", "traceparent": TRACEPARENT}
    body = b'{"prompt": "Once upon a time", "max_tokens": 2}'
    url = f"{endpoint.http_url}/v1/completions"
    assert urlopen(Request(url, body, headers)).status == 200

    def exported() -> set[tuple[str, str]]:
        return {
            (found.name, found.trace_id.hex())
            for batch in traces[1]
            for resource in batch.resource_spans
            for scope in resource.scope_spans
            for found in scope.spans
        }

    model = "text_completion smollm2-135m-instruct"
    trace_ids = (f"{span.get_span_context().trace_id:032x}", TRACEPARENT.split("-")[1])
    names = ("tokenize", "place", "prefill", "decode", model)
    expected = set(itertools.product(names, trace_ids))
    wait_for(lambda: exported() >= expected, lambda: f"{exported()}")
    assert exported() == expected
