"""The caller's trace, so that the server's spans can join it."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from kvmesh.client.checks import Metadata


def trace_context() -> Metadata:
    """`traceparent`, and `tracestate` if there is one, of OpenTelemetry's current span.

    Empty without a span. Only a program that has imported OpenTelemetry can have one, so it
    is not imported here otherwise.
    """
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return ()
    w3c = import_module("opentelemetry.trace.propagation.tracecontext")
    carrier: dict[str, str] = {}
    w3c.TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
