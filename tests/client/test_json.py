"""Every result can be written as JSON."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
from typing import Any

import pytest

import kvmesh
from kvmesh import (
    Client,
    Completion,
    FakeAnswer,
    FakeTransport,
    FieldViolation,
    FinishReason,
    GroupVerdict,
    Loads,
    Message,
)
from kvmesh.client import responses, types
from kvmesh.protos import admin, pb
from tests.client.test_clients import filled

MESSAGES: dict[type, Any] = {
    types.Estimate: pb.EstimateBudgetResponse,
    types.Explanation: pb.ExplainResponse,
    types.ModelInfo: pb.GetModelInfoResponse,
    types.TenantLoads: pb.GetTenantLoadsResponse,
    types.Loads: admin.GetLoadsResponse,
    types.GroupFacts: admin.GroupFacts,
    types.Usage: pb.Usage,
    types.Started: pb.Started,
    types.Queued: pb.Queued,
    types.Prefilling: pb.Prefilling,
    types.Tokens: pb.TokenizeResponse,
}


def results() -> dict[type, Any]:
    """One of each public result, with every field filled, itself or as a part of another."""
    fake = FakeTransport(["ein Wort, zwei"])
    client = Client(transport=fake)
    options: Any = {"logprobs": 2, "prompt_logprobs": 1, "n": 2, "stop": ["zwei"]}
    with client.generate_stream("hi there", **options) as stream:
        events = list(stream.events())
    call = kvmesh.ToolCall("c", "f", "{}")
    answer = FakeAnswer("ein Wort", "hm", (call,))
    with Client(transport=FakeTransport([answer])).generate_stream("hi") as stream_of_calls:
        events += list(stream_of_calls.events())
    roots: list[Any] = [
        answer,
        *(responses.mirror(cls, filled(message())) for cls, message in MESSAGES.items()),
        *events,
        stream.completion,
        FieldViolation("prompt", "is empty"),
        GroupVerdict("g0", 2, 1, "full"),
    ]
    found: dict[type, Any] = {}
    while roots:
        value = roots.pop()
        if isinstance(value, tuple):
            roots.extend(value)
        elif dataclasses.is_dataclass(value):
            found[type(value)] = value
            roots.extend(getattr(value, field.name) for field in dataclasses.fields(value))
    return found


SETTINGS = {kvmesh.RetryPolicy, kvmesh.TLS, Message}
PUBLIC: set[type] = {
    value
    for value in (getattr(kvmesh, name) for name in kvmesh.__all__)
    if inspect.isclass(value) and dataclasses.is_dataclass(value)
}


def test_every_public_result_is_among_these() -> None:
    assert results().keys() == PUBLIC - SETTINGS


@pytest.mark.parametrize("cls", sorted(PUBLIC - SETTINGS, key=str))
def test_a_result_is_written_as_json(cls: type) -> None:
    value = results()[cls]
    as_dict = dataclasses.asdict(value)
    read = json.loads(json.dumps(as_dict, allow_nan=False))
    assert read.keys() == {field.name for field in dataclasses.fields(cls)}
    assert json.dumps(read) == json.dumps(as_dict)


def test_a_completion_in_json() -> None:
    completion = results()[Completion]
    (first, _) = json.loads(json.dumps(dataclasses.asdict(completion)))["choices"]
    assert first["finish_reason"] == "stop"
    assert first["matched_stop"] == "zwei"
    assert first["text"] == "ein Wort, "
    assert first["logprobs"][0]["chosen"]["text"] == "ein"
    assert json.loads(json.dumps(dataclasses.asdict(results()[Loads])))["router"]["refused_total"]


def test_enums_are_texts() -> None:
    enums = {
        value
        for value in vars(types).values()
        if inspect.isclass(value) and issubclass(value, enum.Enum)
    }
    assert FinishReason in enums
    assert all(issubclass(cls, enum.StrEnum) for cls in enums - {enum.StrEnum})
    assert [f"{reason}" for reason in FinishReason] == [
        "stop",
        "length",
        "abort",
        "deadline",
        "tool_calls",
        "other",
    ]
