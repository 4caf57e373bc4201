"""The benchmarks of long prompts: what they send, and that steps are measured to their end."""

from __future__ import annotations

import pytest

from benchmarks import long_prompts, long_steps
from kvmesh.v1 import kvmesh_pb2 as pb


def test_prompts_are_long_and_the_second_shares_all_but_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_prompts, "PROMPT_TOKENS", 3000)
    monkeypatch.setattr(long_prompts, "TEXT_BYTES", 10_000)
    found = {
        name: pb.GenerateRequest.FromString(request)
        for name, request in long_prompts.prompts().items()
    }
    first = list(found["ids"].prompt.token_ids.ids)
    other = list(found["ids with another end"].prompt.token_ids.ids)
    assert len(first) == len(other) == 3000
    assert first[:2000] == other[:2000] and first[2000:] != other[2000:]
    assert 9_000 < len(found["text"].prompt.text) <= 10_100


@pytest.mark.slow
def test_steps_of_a_long_sequence_are_measured() -> None:
    figures = long_steps.measure(1000)
    assert figures["context"] == 1000
    assert all(value > 0 for value in figures.values())
    fastest = long_steps.fastest([figures, figures | {"decode_us": 0.0}])
    assert fastest == figures | {"decode_us": 0.0}
