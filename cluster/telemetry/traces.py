"""Traces: one for each generation, which joins its caller's.

    chat model ── place ── (queue) ── prefill ── decode
                              ▲                     │
                              └── place ◄── engine lost

Names follow OpenTelemetry's conventions for generative AI; what they do not name begins with
`kvmesh.`. There are a few spans and events for each request, none for each token, and no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Value = str | int | float | bool | list[str]

# The caller's headers, while one of its calls is served.
_headers: ContextVar[Mapping[str, str]] = ContextVar("kvmesh_trace_headers")
_HEADERS = ("traceparent", "tracestate")
MAX_CHARS = 128
EXPORT_TIMEOUT_S = 5.0  # so that a receiver that is gone does not hold up a shutdown
# Of a request, by their names in the contract.
PARAMETERS = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "n": "choice.count",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
MAX_INT = (1 << 63) - 1


def note_headers(headers: Iterable[tuple[str, Any]] | None) -> None:
    """Let generations of this task join the trace that is named here.

    headers: of the call, or its metadata
    """
    _headers.set({name: str(value) for name, value in headers or () if name in _HEADERS})


class RequestTrace(Protocol):
    """The trace of a generation."""

    def phase(self, name: str, **attributes: Value) -> None:
        """The phase before, if there is one, ends, and this one begins."""

    def event(self, name: str, **attributes: Value) -> None:
        """Something happens in the current phase."""

    def finish(self, usage: pb.Usage, finish_reasons: list[str]) -> None:
        """The generation has ended by itself."""

    def fail(self, reason: str) -> None:
        """It has ended otherwise. Does nothing after `finish`."""


class Traces(Protocol):
    """Begins traces."""

    def begin(self, request: pb.GenerateRequest, tenant: str) -> RequestTrace: ...

    def close(self) -> None:
        """Export what is left."""


class _Silent:
    """Tracing is off."""

    def begin(self, request: pb.GenerateRequest, tenant: str) -> RequestTrace:
        return self

    def close(self) -> None: ...

    def phase(self, name: str, **attributes: Value) -> None: ...

    def event(self, name: str, **attributes: Value) -> None: ...

    def finish(self, usage: pb.Usage, finish_reasons: list[str]) -> None: ...

    def fail(self, reason: str) -> None: ...


OFF: Traces = _Silent()
NO_TRACE: RequestTrace = _Silent()


class OpenTelemetryTraces:
    """Traces as spans of OpenTelemetry.

    model: the served model's name
    """

    def __init__(self, provider: TracerProvider, model: str) -> None:
        from opentelemetry.trace.propagation import tracecontext

        self._provider = provider
        self._tracer = provider.get_tracer("kvmesh")
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        self._model = model

    def begin(self, request: pb.GenerateRequest, tenant: str) -> RequestTrace:
        from opentelemetry.trace import SpanKind

        operation = "chat" if request.prompt.WhichOneof("kind") == "chat" else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(_headers.get({})),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "kvmesh",
                "gen_ai.request.model": request.model[:MAX_CHARS] or self._model,
                "kvmesh.tenant": tenant,
                **_of_request(request),
            },
        )
        return _Spans(self._tracer, span)

    def close(self) -> None:
        self._provider.shutdown()


class _Spans:
    """A server span, and below it one for each phase."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        self._phase: Any = None

    def phase(self, name: str, **attributes: Value) -> None:
        from opentelemetry.trace import set_span_in_context

        self._end_phase()
        if self._span.is_recording():
            parent = set_span_in_context(self._span)
            self._phase = self._tracer.start_span(name, parent, attributes=_named(attributes))

    def event(self, name: str, **attributes: Value) -> None:
        (self._phase or self._span).add_event(name, _named(attributes))

    def finish(self, usage: pb.Usage, finish_reasons: list[str]) -> None:
        self._end_phase()
        self._span.set_attributes(_of_usage(usage))
        self._span.set_attribute("gen_ai.response.finish_reasons", finish_reasons)
        self._span.end()

    def fail(self, reason: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        if not self._span.is_recording():
            return
        self._end_phase()
        self._span.set_attribute("error.type", reason)
        self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.end()
            self._phase = None


def _of_usage(usage: pb.Usage) -> dict[str, Value]:
    found: dict[str, Value] = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "kvmesh.group": usage.group,
        "kvmesh.queue_s": usage.queue_s,
        "kvmesh.kv_used_bytes": usage.kv_used_bytes,
        "kvmesh.failovers": usage.failovers,
    }
    if usage.HasField("time_to_first_token_s"):
        found["gen_ai.response.time_to_first_chunk"] = usage.time_to_first_token_s
    return found


def _of_request(request: pb.GenerateRequest) -> dict[str, Value]:
    """Its parameters, except for texts. Nothing is checked yet."""
    found: dict[str, Value] = {}
    if request.request_id:
        found["gen_ai.response.id"] = request.request_id[:MAX_CHARS]
    for field, value in request.sampling_params.ListFields():
        name = PARAMETERS.get(field.name)
        if name and abs(value) <= MAX_INT:  # of a number in a span; seeds may be larger
            found[f"gen_ai.request.{name}"] = value
    return found


def _named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    """Names without a dot are ours."""
    return {x if "." in x else f"kvmesh.{x}": value for x, value in attributes.items()}


def make_traces(endpoint: str | None, sample_ratio: float, model: str, version: str) -> Traces:
    """endpoint: of an OTLP receiver, http://host:port or https://…; None switches traces off.

    sample_ratio: share of the traces that no caller has decided about
    Raises ConfigError if what it needs is not installed.
    """
    if endpoint is None:
        return OFF
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(
            "traces.endpoint", f"needs `pip install 'kvmesh[traces]'`: {error}"
        ) from None
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
        resource=Resource.create({"service.name": "kvmesh", "service.version": version}),
    )
    exporter = OTLPSpanExporter(
        endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OpenTelemetryTraces(provider, model)
