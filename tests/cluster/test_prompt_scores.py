"""Log-probabilities of a prompt, from columns of an engine to events of a stream."""

from __future__ import annotations

import numpy as np
import pytest

from kvmesh.cluster.ingress import prompt_scores
from kvmesh.cluster.ingress.prompt_scores import PromptScores
from kvmesh.workers.plan import TokenScores
from tests.cluster.machine import LetterCodec


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("entries", [1, 8, 1000])
@pytest.mark.parametrize("received", [0, 4])
def test_alternatives_are_those_of_their_token_however_events_are_cut(
    monkeypatch: pytest.MonkeyPatch, k: int, entries: int, received: int
) -> None:
    monkeypatch.setattr(prompt_scores, "EVENT_ENTRIES", entries)
    prompt = np.arange(20, dtype=np.int32) % 7
    made = PromptScores(prompt, LetterCodec(), skip_special_tokens=True, received=received)
    at = received + 1
    for count in (5, 1, 9):
        places = np.arange(at, at + count)
        top_ids = (places[:, None] + np.arange(k)).astype(np.int32) % 7
        top = -(places[:, None] + np.arange(k) / 4).astype(np.float32)
        chosen = -places.astype(np.float32)
        made.put(TokenScores(chosen.tobytes(), top_ids.tobytes(), top.tobytes()))
        at += count
    assert made.received == at - 1
    found = [event.prompt_logprobs for event in made.take()]
    assert made.take() == []
    assert all(len(x.chosen) * (1 + k) <= max(entries, 1 + k) for x in found)
    place = received + 1
    for columns in found:
        for index, chosen_id in enumerate(columns.chosen_token_ids):
            best = slice(k * index, k * (index + 1))
            assert chosen_id == prompt[place] and columns.chosen[index] == -place
            assert list(columns.top_token_ids[best]) == [(place + n) % 7 for n in range(k)]
            assert list(columns.top[best]) == [-(place + n / 4) for n in range(k)]
            place += 1
        assert len(columns.chosen_bytes) == len(columns.chosen)
        assert len(columns.top_bytes) == len(columns.top) == k * len(columns.chosen)
    assert place == at
