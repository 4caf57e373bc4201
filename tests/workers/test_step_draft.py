"""What a step tells the ranks of the rows that start and of the tokens to score."""

from __future__ import annotations

import numpy as np
import pytest

from kvmesh.workers.deal import PageDeal
from kvmesh.workers.plan import RowStart
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sequence import HeldPages, Sequence
from kvmesh.workers.sizes import PageGeometry, PageNeed
from kvmesh.workers.step_draft import StepDraft
from kvmesh.workers.step_in_flight import Aboard


def sequence(params: SamplingParams, resumed: int = 0, scored: int = 0) -> Sequence:
    """In row 2, of the tokens 0 to 19, of which the last `resumed` are output."""
    tokens = np.arange(20, dtype=np.int32)
    request = EngineRequest("r", tokens, params, resumed_tokens=resumed, scored_tokens=scored)
    seq = Sequence(request, PageGeometry(16, 0, 0, 4, 1, ranks=3, kvp=3), 1000)
    seq.take_deal(PageDeal(3, 2))
    seq.row = 2
    return seq


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_row_starts_with_its_prompts_length_its_deal_and_what_penalties_need(
    penalty: float,
) -> None:
    params = SamplingParams(repetition_penalty=penalty)
    seq = sequence(params, resumed=5)
    seq.num_computed = 16
    draft = StepDraft(100, [9, 9, 9])
    draft.start_row(seq)
    history = b"" if penalty == 1.0 else np.arange(16, dtype=np.int32).tobytes()
    assert draft.finish(1).plan.row_starts == [RowStart(2, params, 15, history, 2)]


@pytest.mark.parametrize(
    ("start", "end", "scored", "score_start", "targets"),
    [
        (0, 8, 0, 0, range(1, 9)),
        (8, 20, 8, 8, range(9, 20)),
        (8, 20, 10, 10, range(11, 20)),
        (8, 20, 19, 19, range(0)),
        (19, 20, 0, 19, range(0)),
    ],
)
def test_the_targets_of_a_chunk_are_the_prompts_tokens_after_positions_without_a_score(
    start: int, end: int, scored: int, score_start: int, targets: range
) -> None:
    draft = StepDraft(100, [9, 9, 9])
    seq = sequence(SamplingParams(prompt_logprobs=1), scored=scored)
    draft.add_chunk(seq, start, end)
    (chunk,) = draft.finish(1).plan.chunks
    assert (chunk.score_start, chunk.sample) == (score_start, end == 20)
    assert np.frombuffer(chunk.targets, np.int32).tolist() == [*targets]


def test_a_step_knows_what_its_sequences_hold() -> None:
    draft, seq = StepDraft(100, [9, 9, 9]), sequence(SamplingParams())
    held = HeldPages(PageNeed(2, 1), PageNeed(1, 1))
    draft.add_chunk(seq, 0, 20, held)
    step = draft.finish(1)
    assert step.aboard == [Aboard(seq, step.plan.chunks[0], held)]


@pytest.mark.parametrize("start", [0, 8])
def test_a_chunk_has_no_targets_where_no_scores_are_wanted(start: int) -> None:
    draft = StepDraft(100, [9, 9, 9])
    draft.add_chunk(sequence(SamplingParams()), start, 20)
    (chunk,) = draft.finish(1).plan.chunks
    assert chunk.targets == b""
