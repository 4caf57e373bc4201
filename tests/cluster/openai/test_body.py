"""Bodies of requests: wrong ones cost no more than their first error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from kvmesh.cluster.errors import UnsupportedFieldError
from kvmesh.cluster.openai.body import RequestBody, read_body
from kvmesh.cluster.openai.chat import ChatBody
from kvmesh.cluster.openai.completions import CompletionBody
from kvmesh.cluster.openai.responses import ResponseBody
from kvmesh.cluster.openai.text_calls import DetokenizeBody, TokenizeBody
from kvmesh.workers.errors import InvalidFieldError

MANY = 50
BODIES: list[tuple[type[RequestBody], dict[str, Any], str]] = [
    (CompletionBody, {"prompt": ["a"] + [1] * MANY}, "prompt[1]"),
    (CompletionBody, {"prompt": [1] + ["a"] * MANY}, "prompt[1]"),
    (CompletionBody, {"prompt": [[1], *([["a"] * MANY] * MANY)]}, "prompt[1][0]"),
    (CompletionBody, {"prompt": "a", "stop": [1] * MANY}, "stop"),
    (CompletionBody, {"prompt": "a", "logit_bias": {f"{i}": "x" for i in range(MANY)}},
     "logit_bias.0"),
    (CompletionBody, {"prompt": "a", **{f"x{i}": 1 for i in range(MANY)}}, "x0"),
    (ChatBody, {"messages": [{}] * MANY}, "messages[0].role"),
    (ChatBody, {"messages": [{"role": "user", "content": [{"type": 1}] * MANY}]},
     "messages[0].content[0].type"),
    (ChatBody, {"messages": [{"role": "user", **{f"x{i}": 1 for i in range(MANY)}}] * MANY},
     "messages[0].x0"),
    (ResponseBody, {"input": [{"role": 1}] * MANY}, "input[0].role"),
    (TokenizeBody, {"messages": [1] * MANY}, "messages[0]"),
    (DetokenizeBody, {"tokens": ["a"] * MANY}, "tokens[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body", "field"), BODIES)
def test_errors_are_not_collected_for_every_element(
    kind: type[RequestBody], body: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        read_body(kind, msgspec.json.encode(body))
    assert caught.value.field.startswith(field)
    with pytest.raises(ValidationError) as all_of_them:
        kind.model_validate(body)
    assert all_of_them.value.error_count() <= 2, "one for each kind of value that a field may have"


def test_a_field_is_known_by_its_name_in_json() -> None:
    known = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    body: dict[str, Any] = {"messages": [], "response_format": known}
    read_body(ChatBody, msgspec.json.encode(body))
    known["json_schema"] = {"schema_": {}}
    with pytest.raises(UnsupportedFieldError) as caught:
        read_body(ChatBody, msgspec.json.encode(body))
    assert caught.value.field == "response_format.json_schema.schema_"
