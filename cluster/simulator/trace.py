"""Traces of real serving: arrival times and lengths of requests."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

BLOCK_TOKENS = 512  # of a Mooncake trace's hash ids
FORMATS = ("mooncake", "azure")
TIDE_POINTS = 1000  # of each period, that arrivals are interpolated between
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length", "hash_ids")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


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

    Raises ValueError, with file and line, if there is none or it is not in the format.
    """
    name = trace_format or ("mooncake" if path.suffix == ".jsonl" else "azure")
    if name not in FORMATS:
        raise ValueError(f"trace_format must be one of {', '.join(FORMATS)}, got {name!r}")
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the trace {path} is not text: {error}") from error
    requests = (_read_mooncake if name == "mooncake" else _read_azure)(path, lines)
    if not requests:
        raise ValueError(f"{path} has no requests")
    return sorted(requests, key=lambda request: request.arrival_s)


def at_rate(requests: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """The same requests arriving `factor` times as fast."""
    if not factor > 0:
        raise ValueError(f"rate must be greater than 0, got {factor}")
    return [replace(request, arrival_s=request.arrival_s / factor) for request in requests]


def with_tide(
    requests: Sequence[TraceRequest], period_s: float, swing: float
) -> list[TraceRequest]:
    """The same requests, arriving at a rate that rises and falls, from its lowest on.

    period_s: from one low to the next
    swing: the rate is between 1 - swing and 1 + swing times that of the trace
    """
    if not period_s > 0:
        raise ValueError(f"the period of a tide must be greater than 0 s, got {period_s}")
    if not 0 <= swing <= 1:
        raise ValueError(f"the swing of a tide must be within [0, 1], got {swing}")
    ends_s = requests[-1].arrival_s + period_s
    times = np.linspace(0.0, ends_s, 1 + math.ceil(TIDE_POINTS * ends_s / period_s))
    angle = 2.0 * math.pi / period_s
    passed = times - swing / angle * np.sin(angle * times)  # of the trace's own time
    at = np.interp([request.arrival_s for request in requests], passed, times)
    pairs = zip(requests, at, strict=True)
    return [replace(request, arrival_s=float(moved)) for request, moved in pairs]


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


def _read_mooncake(path: Path, lines: Sequence[str]) -> list[TraceRequest]:
    """The file rounds arrivals to 3 s; here they are spread randomly over that interval."""
    rows: list[tuple[int, int, int, list[int]]] = []
    for number, line in enumerate(lines, 1):
        with _row(path, number, "a Mooncake trace's JSON object with " + ", ".join(MOONCAKE_KEYS)):
            if line.strip():
                row = json.loads(line)
                stamp, prompt, output, blocks = (row[key] for key in MOONCAKE_KEYS)
                rows.append((int(stamp), _tokens(prompt), int(output), [int(x) for x in blocks]))
    spread = random.Random(0)
    stamps = sorted({row[0] for row in rows})
    rounding_ms = min((later - earlier for earlier, later in pairwise(stamps)), default=0)
    return [
        TraceRequest(
            request_id=f"r{index}",
            arrival_s=(stamp + spread.random() * rounding_ms) / 1000,
            prompt_tokens=prompt,
            output_tokens=max(1, output),
            blocks=tuple(blocks[: prompt // BLOCK_TOKENS]),
        )
        for index, (stamp, prompt, output, blocks) in enumerate(rows)
    ]


def _read_azure(path: Path, lines: Sequence[str]) -> list[TraceRequest]:
    rows: list[tuple[datetime.datetime, int, int]] = []
    for number, row in enumerate(csv.DictReader(lines), 2):
        with _row(path, number, "an Azure trace's columns " + ", ".join(AZURE_COLUMNS)):
            stamp, prompt, output = (row[key] for key in AZURE_COLUMNS)
            # seven digits of a second: one more than Python reads
            at = datetime.datetime.fromisoformat(stamp[:26])
            rows.append((at, _tokens(prompt), max(1, int(output))))
    start = min((at for at, _, _ in rows), default=None)
    return [
        TraceRequest(f"r{index}", (at - start).total_seconds() if start else 0.0, prompt, output)
        for index, (at, prompt, output) in enumerate(rows)
    ]


def _tokens(value: str | int) -> int:
    """Of a prompt; raises ValueError for a number that none can have."""
    count = int(value)
    if count < 0:
        raise ValueError(f"a prompt of {count} tokens")
    return max(1, count)


@contextlib.contextmanager
def _row(path: Path, number: int, expected: str) -> Iterator[None]:
    """Raise ValueError with the place if a row is not what is expected."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: expected {expected}; {error!r}") from error


def _conversation(request: TraceRequest) -> int:
    """The first block after the one that nearly all requests start with, or the id."""
    return request.blocks[1] if len(request.blocks) > 1 else int(request.request_id[1:])
