"""Reasoning is split from the answer, in whatever pieces both come."""

from __future__ import annotations

import itertools

import pytest

from kvmesh.cluster.ingress.answers.model_form import ModelForm
from kvmesh.cluster.ingress.answers.reasoning import ReasoningSplit
from kvmesh.workers.constraint import Reasoning

CASES = [
    # (started, text, reasoning, answer)
    (False, "<think>\nIt is\n\nso.\n</think>\n\nYes.\n", "It is\n\nso.", "Yes.\n"),
    (False, " \n<think>a</think>b", "a", "b"),
    (False, "No <think> here", "", "No <think> here"),
    (False, "\n\nAnswer", "", "\n\nAnswer"),
    (False, "<thin", "", "<thin"),
    (False, "  ", "", "  "),
    (False, "<think></think>", "", ""),
    (True, "so\n</think>\nYes", "so", "Yes"),
    (True, "never ends <", "never ends <", ""),
    (True, "a </thi </think>b</think>c", "a </thi ", "b</think>c"),
    (True, "</think>  x", "", "  x"),
    (True, "", "", ""),
]


@pytest.mark.parametrize(("started", "text", "reasoning", "answer"), CASES)
def test_reasoning_is_split_from_the_answer(
    started: bool, text: str, reasoning: str, answer: str
) -> None:
    for cuts in itertools.chain([()], itertools.combinations(range(len(text) + 1), 2)):
        split = ReasoningSplit(Reasoning("<think>", "</think>", started=started))
        ends = [*cuts, len(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
        parts = [split.push(piece) for piece in pieces] + [split.finish()]
        assert "".join(part for part, _ in parts) == reasoning
        assert "".join(part for _, part in parts) == answer


def test_reasoning_is_streamed() -> None:
    split = ReasoningSplit(Reasoning("<think>", "</think>", started=True))
    assert split.push("one two") == ("one two", "")
    assert split.push(" three </") == (" three ", "")


FORM = ModelForm.of("{{ '<think>' }}", {"</s>": 2})


@pytest.mark.parametrize(
    ("tail", "continued", "started"),
    [
        ("user\nhi<|im_end|>\n<|im_start|>assistant\n", None, False),
        ("<|im_start|>assistant\n<think>\n", None, True),
        ("<｜Assistant｜><think>", None, True),
        ("assistant\n<think>\n\n</think>\n\n", None, None),
        ("any", "<think>\nI began", True),
        ("any", "<think>\nI ended</think>So", None),
        ("any", "An answer", None),
    ],
)
def test_the_end_of_a_prompt_shows_where_the_model_is(
    tail: str, continued: str | None, started: bool | None
) -> None:
    found = FORM.reasoning(tail, continued)
    assert (None if found is None else found.started) == started


def test_only_models_that_show_it_reason() -> None:
    assert ModelForm.of("{{ messages }}", {}).think is None
    assert ModelForm.of(None, {"</think>": 7}).think is not None
    assert ModelForm.of("{{ messages }}", {}, reasoning_parser="think").think is not None
    assert ModelForm.of("<think>", {}, reasoning_parser="none").think is None


def test_special_tokens_are_written_by_id_and_read_as_text() -> None:
    form = ModelForm.of("<think> <tool_call> tools", {"</think>": 9, "<tool_call>": 8, "<s>": 1})
    assert form.marker("</think>") == "<[9]>"
    assert form.marker("<think>") == '"<think>"'
    assert form.markers(form.reasoning("x", None), form.syntax) == {
        9: "</think>",
        8: "<tool_call>",
    }
