"""Which requests a run sends: lengths, times, prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmesh.cluster.bench.lengths import LengthDistribution
from kvmesh.cluster.bench.prompts import WORDS, PromptMaker
from kvmesh.cluster.bench.sharegpt import sharegpt_requests
from kvmesh.cluster.bench.workload import (
    BenchRequest,
    arriving,
    random_requests,
    replayed,
    sharegpt_like,
)
from kvmesh.cluster.simulator.trace import TraceRequest

RANDOM = np.random.default_rng(0)


def draw(text: str, count: int = 20_000) -> Any:
    return LengthDistribution.parse(text).draw(np.random.default_rng(0), count)


def test_lengths_have_the_distribution_that_is_named() -> None:
    assert set(draw("7")) == {7}
    assert set(draw("uniform:3,5")) == {3, 4, 5}
    normal = draw("normal:500,100")
    assert normal.mean() == pytest.approx(500, rel=0.01)
    assert normal.std() == pytest.approx(100, rel=0.03)
    lognormal = draw("lognormal:160,1.0")
    assert lognormal.mean() == pytest.approx(160, rel=0.05), "the mean of lengths, not of logs"
    assert np.log(lognormal).std() == pytest.approx(1.0, rel=0.05)
    clipped = draw("lognormal:160,1.0,100,200")
    assert (clipped.min(), clipped.max()) == (100, 200)
    assert draw("normal:1,50").min() == 1, "no prompt is empty"


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "nan", "inf", "uniform:5", "uniform:5,3", "uniform:0,3", "normal:5",
     "normal:5,1,2", "normal:5,-1", "normal:5,1,9,3", "zipf:3", "lognormal:nan,1", "a,b", "7,8"],
)  # fmt: skip
def test_wrong_lengths_say_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match="lognormal:MEAN,SIGMA"):
        LengthDistribution.parse(text)


def test_a_seed_gives_the_same_requests() -> None:
    lengths = LengthDistribution.parse("uniform:1,1000")
    one, same, other = (random_requests(lengths, lengths, 50, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert [x.prompt_tokens for x in one] != [x.output_tokens for x in one]


def test_sharegpt_like_lengths_stay_within_the_filter() -> None:
    found = sharegpt_like(5000, 0)
    assert all(4 <= x.prompt_tokens <= 1024 for x in found)
    assert all(x.prompt_tokens + x.output_tokens <= 2048 for x in found)
    assert np.mean([x.prompt_tokens for x in found]) == pytest.approx(150, abs=12)
    assert np.mean([x.output_tokens for x in found]) == pytest.approx(335, abs=12)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float, variation: float) -> None:
    requests = random_requests(*(LengthDistribution.parse("1"),) * 2, 20_000, 0)
    times = [x.arrival_s for x in arriving(requests, 50.0, burstiness, 0)]
    assert times[0] == 0.0
    gaps = np.diff(np.array(times))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_an_infinite_rate_sends_all_at_once() -> None:
    requests = sharegpt_like(3, 0)
    assert {x.arrival_s for x in arriving(requests, float("inf"), 1.0, 0)} == {0.0}


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (float("nan"), 1), (1, 0)])
def test_wrong_rates(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        arriving(sharegpt_like(3, 0), rate, burstiness, 0)


TRACE = [
    TraceRequest("r0", 0.0, 1100, 10, blocks=(0, 1)),
    TraceRequest("r1", 4.0, 1600, 20, blocks=(0, 1, 2)),
    TraceRequest("r2", 8.0, 700, 1, blocks=(3,)),
]


@pytest.mark.parametrize(("scale", "shared"), [(1.0, 1024), (0.1, 102), (0.001, 0)])
def test_a_replayed_trace_shares_prefixes_as_the_trace_does(scale: float, shared: int) -> None:
    one, two, three = replayed(TRACE, speed=2.0, scale=scale)
    assert [x.arrival_s for x in (one, two, three)] == [0.0, 2.0, 4.0]
    assert two.prompt_tokens == max(1, round(1600 * scale))
    prompts = [PromptMaker(0).make(x) for x in (one, two, three)]
    assert [len(x) for x in prompts] == [x.prompt_tokens for x in (one, two, three)]
    assert prompts[0][:shared] == prompts[1][:shared]
    assert prompts[0][shared : shared + 1] != prompts[1][shared : shared + 1] or scale < 0.01
    assert prompts[0][:1] != prompts[2][:1]


def test_prompts_are_the_same_in_every_run_and_differ_from_each_other() -> None:
    maker = PromptMaker(3, low=10, high=90)
    requests = [BenchRequest(number, 200, 1) for number in range(2)]
    first, second = map(maker.make, requests)
    assert first == PromptMaker(3, low=10, high=90).make(requests[0])
    assert first != second
    assert first != PromptMaker(4, low=10, high=90).make(requests[0])
    assert len(first) == 200
    assert {type(x) for x in first} == {int}
    assert 10 <= min(map(int, first)) <= max(map(int, first)) < 90


def test_a_prefix_is_shared_by_all_and_part_of_the_length() -> None:
    maker = PromptMaker(0, prefix_tokens=50)
    long, other, short = (maker.make(BenchRequest(n, t, 1)) for n, t in enumerate((80, 90, 20)))
    assert long[:50] == other[:50]
    assert long[50:] != other[50:80]
    assert (len(long), len(other), len(short)) == (80, 90, 20)
    assert short == long[:20]


def test_words_are_as_many_as_the_tokens_that_were_asked_for() -> None:
    text = PromptMaker(0, words=True).make(BenchRequest(0, 30, 1))
    assert isinstance(text, str)
    assert len(text.split(" ")) == 30
    assert set(text.split(" ")) <= set(WORDS)


async def words_of(text: str) -> int:
    return len(text.split())


def conversation(prompt_words: int, answer_words: int) -> dict[str, Any]:
    turns = [("human", "p " * prompt_words), ("gpt", "a " * answer_words), ("human", "more")]
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


async def test_a_sharegpt_file_is_filtered_as_others_filter_it(tmp_path: Path) -> None:
    kept = [conversation(10, 20), conversation(1024, 1024)]
    left_out = [conversation(3, 20), conversation(10, 3), conversation(1025, 9),
                conversation(1000, 1049), {"conversations": []}]  # fmt: skip
    file = tmp_path / "share.json"
    file.write_text(json.dumps([*left_out, *kept]))
    found = await sharegpt_requests(file, 2, 0, words_of)
    assert {(x.prompt_tokens, x.output_tokens) for x in found} == {(10, 20), (1024, 1024)}
    assert [x.number for x in found] == [0, 1]
    assert PromptMaker(0).make(found[0]) == found[0].text
    with pytest.raises(ValueError, match="has 2 conversations of suitable lengths"):
        await sharegpt_requests(file, 3, 0, words_of)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"conversations": 3}]', '[{"conversations": [1, 2]}]']
)
async def test_other_files_are_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "share.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="expected a ShareGPT file"):
        await sharegpt_requests(file, 1, 0, words_of)
    with pytest.raises(ValueError, match="cannot read"):
        await sharegpt_requests(tmp_path / "none.json", 1, 0, words_of)
