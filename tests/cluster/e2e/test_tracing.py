"""A caller's trace goes through the SDK, or over HTTP, and a cluster to a collector."""

from __future__ import annotations

import itertools
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import use_span

from kvmesh.client import Client
from tests.cluster.e2e.harness import serving, small_config, wait_for
from tests.cluster.otlp import receiver

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # of an HTTP client


def test_a_trace_from_the_caller_to_the_collector(tmp_path: Path) -> None:
    span = TracerProvider().get_tracer("caller").start_span("ask")
    with receiver() as (collector, batches):
        config = small_config(traces={"endpoint": collector, "sample_ratio": 0})
        with serving(config, tmp_path) as endpoint:
            with Client(endpoint.target, api_key=endpoint.api_key) as client:
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
                    for batch in batches
                    for resource in batch.resource_spans
                    for scope in resource.scope_spans
                    for found in scope.spans
                }

            model = "text_completion smollm2-135m-instruct"
            traces = (f"{span.get_span_context().trace_id:032x}", TRACEPARENT.split("-")[1])
            names = ("tokenize", "place", "prefill", "decode", model)
            expected = set(itertools.product(names, traces))
            wait_for(lambda: exported() >= expected, lambda: f"{exported()}")
        assert exported() == expected
