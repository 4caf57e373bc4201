"""Reading traces, and changing them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmesh.cluster.simulator.trace import at_rate, inject_long, read_trace, with_tenants

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 9, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 2048, "output_length": 5, "hash_ids": [0, 1, 3, 4]},
    {"timestamp": 6000, "input_length": 20, "output_length": 0, "hash_ids": [5]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MOONCAKE))
    return path


def test_a_mooncake_trace_names_only_full_blocks(mooncake: Path) -> None:
    requests = read_trace(mooncake)
    assert [request.blocks for request in requests] == [(0, 1), (0, 1, 3, 4), ()]
    assert [request.output_tokens for request in requests] == [9, 5, 1]
    assert [int(request.arrival_s // 3) for request in requests] == [0, 1, 2]
    assert read_trace(mooncake) == requests


def test_an_azure_trace_starts_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    first, second = read_trace(path)
    assert first.arrival_s == 0.0
    assert second.arrival_s == pytest.approx(4.314579)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)
    with pytest.raises(ValueError, match="line 1: expected a Mooncake"):
        read_trace(path, "mooncake")
    with pytest.raises(ValueError, match="trace_format"):
        read_trace(path, "other")


def test_rates_tenants_and_long_prompts(mooncake: Path) -> None:
    requests = read_trace(mooncake)
    faster = at_rate(requests, 2.0)
    assert faster[-1].arrival_s == pytest.approx(requests[-1].arrival_s / 2)
    with pytest.raises(ValueError, match="rate"):
        at_rate(requests, 0.0)
    divided = with_tenants(requests, 2)
    assert divided[0].tenant == divided[1].tenant  # one conversation
    added = inject_long(requests, 2, 1 << 20)
    assert [request.injected for request in added].count(True) == 2
    assert added == sorted(added, key=lambda request: request.arrival_s)
