"""Traces of real serving: arrival times and lengths of requests."""

from __future__ import annotations

import csv
import datetime
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

BLOCK_TOKENS = 512  # of a Mooncake trace's hash ids
FORMATS = ("mooncake", "azure")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    arrival_s: since the trace's start
    blocks: ids of the prompt's full 512-token blocks; equal ids mean an equal prefix
    injected: added to the trace
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    tenant: str = "default"
    injected: bool = False


def read_trace(path: Path, trace_format: str | None = None) -> list[TraceRequest]:
    """Read a trace, sorted by arrival. By default the file's name determines the format.

    Raises ValueError if the format is unknown or does not match the file.
    """
    name = trace_format or ("mooncake" if path.suffix == ".jsonl" else "azure")
    if name not in FORMATS:
        raise ValueError(f"trace_format must be one of {', '.join(FORMATS)}, got {name!r}")
    try:
        requests = _read_mooncake(path) if name == "mooncake" else _read_azure(path)
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a {name} trace: {error!r}") from error
    if not requests:
        raise ValueError(f"{path} has no requests")
    return sorted(requests, key=lambda request: request.arrival_s)


def at_rate(requests: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """The same requests arriving `factor` times as fast."""
    if not factor > 0:
        raise ValueError(f"rate must be greater than 0, got {factor}")
    return [replace(request, arrival_s=request.arrival_s / factor) for request in requests]


def with_tenants(requests: Sequence[TraceRequest], count: int) -> list[TraceRequest]:
    """Divide conversations among `count` tenants; public traces have no tenants."""
    if count < 1:
        raise ValueError(f"tenants must be at least 1, got {count}")
    return [
        replace(request, tenant=f"tenant-{_conversation(request) % count}") for request in requests
    ]


def inject_long(
    requests: Sequence[TraceRequest], count: int, prompt_tokens: int, output_tokens: int = 512
) -> list[TraceRequest]:
    """Add `count` long requests, evenly spaced; no public trace has such lengths."""
    if count < 0 or prompt_tokens < 1:
        raise ValueError(f"inject_long must be N@TOKENS, got {count}@{prompt_tokens}")
    end_s = requests[-1].arrival_s
    added = [
        TraceRequest(
            f"long-{index}",
            end_s * (index + 1) / (count + 1),
            prompt_tokens,
            output_tokens,
            tenant="long",
            injected=True,
        )
        for index in range(count)
    ]
    return sorted([*requests, *added], key=lambda request: request.arrival_s)


def _read_mooncake(path: Path) -> list[TraceRequest]:
    """The file rounds arrivals to 3 s; here they are spread randomly over that interval."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    spread = random.Random(0)
    stamps = sorted({row["timestamp"] for row in rows})
    steps = [later - earlier for earlier, later in pairwise(stamps)]
    rounding_ms = min(steps, default=0)
    return [
        TraceRequest(
            request_id=f"r{index}",
            arrival_s=(row["timestamp"] + spread.random() * rounding_ms) / 1000,
            prompt_tokens=row["input_length"],
            output_tokens=max(1, row["output_length"]),
            blocks=tuple(row["hash_ids"][: row["input_length"] // BLOCK_TOKENS]),
        )
        for index, row in enumerate(rows)
    ]


def _read_azure(path: Path) -> list[TraceRequest]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # seven digits of a second: one more than Python reads
    times = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    start = min(times, default=None)
    return [
        TraceRequest(
            request_id=f"r{index}",
            arrival_s=(at - start).total_seconds() if start else 0.0,
            prompt_tokens=max(1, int(row["ContextTokens"])),
            output_tokens=max(1, int(row["GeneratedTokens"])),
        )
        for index, (row, at) in enumerate(zip(rows, times, strict=True))
    ]


def _conversation(request: TraceRequest) -> int:
    """The first block after the one that nearly all requests start with, or the id."""
    return request.blocks[1] if len(request.blocks) > 1 else int(request.request_id[1:])
