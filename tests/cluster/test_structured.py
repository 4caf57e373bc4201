"""Structured output through ingress, router and engine, whatever happens to the engine."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest

from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from tests.cluster.machine import Machine, machine
from tests.cluster.test_generation import make_request, read, read_until, rest_of, resumed
from tests.workers.test_leader import MANY

PATTERN = "[C-Q]{30,40}(ab|cd){20}"


def bound(request: pb.GenerateRequest, pattern: str = PATTERN) -> pb.GenerateRequest:
    request.structured_output.regex = pattern
    return request


@pytest.fixture
async def two() -> AsyncIterator[Machine]:
    async with machine(2) as built:
        yield built


@pytest.fixture
async def one() -> AsyncIterator[Machine]:
    async with machine() as built:
        yield built


async def test_the_output_matches(one: Machine) -> None:
    one.allow(MANY)
    received = await read(one.stream(bound(make_request(120, n=2))))
    for index in range(2):
        assert re.fullmatch(PATTERN, received.text[index])
        assert received.reason(index) == "stop"


async def test_an_output_that_is_cut_matches_so_far(one: Machine) -> None:
    one.allow(MANY)
    received = await read(one.stream(bound(make_request(20))))
    assert re.fullmatch("[C-Q]{20}", received.text[0])
    assert received.reason() == "length"


async def test_it_matches_after_the_engine_was_lost(two: Machine) -> None:
    two.allow(MANY)
    whole = await read(two.stream(bound(make_request(120))))
    async with machine(2) as built:
        stream = built.stream(bound(make_request(120)))
        built.allow(20)
        received = await read_until(stream, 12)
        assert received.started is not None
        built.engines[received.started.group].cut()
        built.allow(MANY)
        await rest_of(stream, received)
    assert received.usage is not None
    assert received.usage.failovers == 1
    assert (received.tokens, received.text) == (whole.tokens, whole.text)


@pytest.mark.parametrize("cut", [0, 1, 17, 30, 45])
async def test_it_matches_when_the_stream_is_resumed(one: Machine, cut: int) -> None:
    one.allow(MANY)
    whole = await read(one.stream(bound(make_request(120))))
    tokens = whole.tokens[0]
    request = resumed(bound(make_request(120)), {0: (tokens[:cut], cut)})
    received = await read(one.stream(request), {0: cut})
    assert received.tokens[0] == tokens[cut:]
    assert received.text[0] == whole.text[0][cut:]
    assert received.reason() == "stop"


async def test_the_end_of_a_resumed_output_is_found_whatever_min_tokens_says(one: Machine) -> None:
    one.allow(MANY)
    request = bound(make_request(60, min_tokens=50), "[C-Q]{5}")
    whole = await read(one.stream(request))
    assert (len(whole.tokens[0]), whole.reason()) == (6, "stop")
    received = await read(one.stream(resumed(request, {0: (whole.tokens[0], 5)})), {0: 6})
    assert received.tokens == {}
    assert received.reason() == "stop"


@pytest.mark.parametrize(
    ("output", "field"),
    [
        (pb.StructuredOutput(), "structured_output"),
        (pb.StructuredOutput(regex="(?=a)"), "structured_output.regex"),
        (pb.StructuredOutput(regex=""), "structured_output.regex"),
        (pb.StructuredOutput(regex="a" * 300_000), "structured_output.regex"),
        (pb.StructuredOutput(json_schema="{"), "structured_output.json_schema"),
        (pb.StructuredOutput(json_schema="[" * 100_000), "structured_output.json_schema"),
        (pb.StructuredOutput(json_schema='{"not": {}}'), "structured_output.json_schema"),
        (pb.StructuredOutput(grammar="x"), "structured_output.grammar"),
        (pb.StructuredOutput(json_object=False), "structured_output.json_object"),
        (
            pb.StructuredOutput(choice=pb.OutputChoices()),
            "structured_output.choice.values",
        ),
        (
            pb.StructuredOutput(choice=pb.OutputChoices(values=["a"] * 10_001)),
            "structured_output.choice.values",
        ),
    ],
)
async def test_a_refusal_names_the_field_and_computes_nothing(
    one: Machine, output: pb.StructuredOutput, field: str
) -> None:
    request = make_request()
    request.structured_output.CopyFrom(output)
    with pytest.raises(InvalidFieldError) as caught:
        await read(one.stream(request))
    assert caught.value.field == field
    assert not one.router.placed


async def test_a_grammar_is_tried_once(one: Machine) -> None:
    one.allow(MANY)
    await read(one.stream(bound(make_request(5, request_id="a"), "[C-F]+")))
    (kept,) = one.ingress._planner._kept.values()
    await read(one.stream(bound(make_request(5, request_id="b"), "[C-F]+")))
    assert list(one.ingress._planner._kept.values()) == [kept]
