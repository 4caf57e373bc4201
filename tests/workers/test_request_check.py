"""Which requests an engine can serve, at their limits."""

from __future__ import annotations

import pytest

from kvmesh.workers.errors import InvalidFieldError, PoolCapacityError
from kvmesh.workers.request_check import check_request
from kvmesh.workers.sampling_params import SamplingParams
from tests.workers.memory_executor import VOCAB
from tests.workers.test_engine import make_engine, request, run, tokens_of


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"prompt": []}, "prompt", "at least one token"),
        ({"prompt": [5, VOCAB]}, "prompt.token_ids", f"{VOCAB} is not a valid"),
        ({"prompt": [-1]}, "prompt.token_ids", "-1 is not a valid"),
        ({"prompt": [1] * 800}, "prompt", "less than 800 tokens"),
        (
            {"params": SamplingParams(stop_token_ids=(0, VOCAB))},
            "stop_token_ids",
            f"{VOCAB} is not a valid",
        ),
        ({"params": SamplingParams(logit_bias={-1: 1.0})}, "logit_bias", "-1 is not a valid"),
        ({"resumed_tokens": 3}, "resumed_tokens", "from 0 to 2,"),
        ({"prompt": [1], "resumed_tokens": 1}, "resumed_tokens", "from 0 to 0,"),
        ({"scored_tokens": 3}, "scored_tokens", "from 0 to 2,"),
        ({"scored_tokens": -1}, "scored_tokens", "from 0 to 2,"),
        ({"resumed_tokens": 1, "scored_tokens": 2}, "scored_tokens", "from 0 to 1,"),
        ({"timeout_s": 0.0}, "timeout_s", "0"),
        ({"timeout_s": float("nan")}, "timeout_s", "nan"),
    ],
)
def test_impossible_requests_are_refused_by_field(
    change: dict[str, object], field: str, message: str
) -> None:
    engine, _ = make_engine()
    kwargs: dict[str, object] = {"prompt": [1, 2, 3], **change}
    with pytest.raises(InvalidFieldError) as caught:
        bad = request("bad", kwargs.pop("prompt"), **kwargs)  # type: ignore[arg-type]
        check_request(bad, engine.info)
    assert caught.value.field == field
    assert message in caught.value.message


def test_the_least_and_the_largest_values_are_accepted() -> None:
    engine, _ = make_engine()
    ends = (0, VOCAB - 1)
    params = SamplingParams(stop_token_ids=ends, logit_bias=dict.fromkeys(ends, 1.0))
    check_request(
        request("r", [*ends, 0], params=params, resumed_tokens=1, scored_tokens=1, timeout_s=1e-3),
        engine.info,
    )


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "resumed", "accepted"),
    [
        (799, 5, 0, True),  # one token of output is left
        (800, 5, 0, False),
        (10, 4, 3, True),  # one more may be generated
        (10, 4, 4, False),
        (3, 9, 2, True),  # one token of the prompt is left
        (3, 9, 3, False),
        (3, 9, -1, False),
    ],
)
def test_the_longest_prompts_and_outputs_that_are_accepted(
    prompt: int, max_tokens: int, resumed: int, accepted: bool
) -> None:
    engine, _ = make_engine(budget=400)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    item = request("r", [3] * prompt, params=params, resumed_tokens=resumed)
    if not accepted:
        with pytest.raises(InvalidFieldError):
            check_request(item, engine.info)
        return
    check_request(item, engine.info)
    engine.add(item)
    room = min(max_tokens - resumed, 800 - prompt)
    assert len(tokens_of(run(engine)["r"])) == room


def test_resumed_tokens_count_once_against_the_pool() -> None:
    engine, _ = make_engine(budget=60)
    limit = engine.geometry.tokens_within(engine.info.capacity.sealed)
    for tokens, fits in ((limit, True), (limit + 1, False)):
        item = request("r", [3] * 30, tokens - 20, resumed_tokens=10)
        if fits:
            check_request(item, engine.info)
        else:
            with pytest.raises(PoolCapacityError):
                check_request(item, engine.info)


def test_a_request_that_exceeds_the_pool_is_refused_with_bytes() -> None:
    engine, _ = make_engine(budget=60)
    with pytest.raises(PoolCapacityError) as caught:
        check_request(request("huge", [1] * 700, 90), engine.info)
    needed, available = caught.value.needed_bytes, caught.value.available_bytes
    assert needed > available > 0
    assert f"needs {needed:,} bytes of KV cache; this group has {available:,}" in str(caught.value)
    assert caught.value.retryable is False
