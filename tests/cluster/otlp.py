"""A receiver of traces, as collectors of OpenTelemetry have one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

Batch = trace_service_pb2.ExportTraceServiceRequest


@contextmanager
def receiver() -> Iterator[tuple[str, list[Batch]]]:
    """A real OTLP receiver: its address, and what has arrived."""
    batches: list[Batch] = []

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, sent: Batch, context: object) -> object:
            batches.append(sent)
            return trace_service_pb2.ExportTraceServiceResponse()

    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"http://127.0.0.1:{port}", batches
        finally:
            server.stop(None).wait()
