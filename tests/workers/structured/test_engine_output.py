"""What an engine generates within a constraint."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given

from kvmesh.workers.constraint import OutputConstraint, Reasoning
from kvmesh.workers.engine import Engine
from kvmesh.workers.request import EndReason, PinTerms
from kvmesh.workers.structured import grammar
from kvmesh.workers.structured.grammar import Grammar
from tests.exercised import Exercised
from tests.scenarios import SEEDS, scenarios
from tests.workers.structured.schemas import random_schema
from tests.workers.structured.tiny import (
    PROMPT,
    config_of,
    generate,
    generate_on,
    request,
    tokenizer,
)
from tests.workers.thread_ranks import ThreadRanks

EOS = 2
SEEN = Exercised("structured output", {"complete documents": 30, "objects": 5})


def constraint(found: Grammar, reasoning: Reasoning | None = None) -> OutputConstraint:
    return OutputConstraint(found.text(), reasoning)


def matching(pattern: str) -> OutputConstraint:
    return constraint(grammar.regex(pattern))


@pytest.mark.slow
@SEEN.required
@scenarios(3)
@given(SEEDS)
def test_a_document_that_ends_is_valid(seed: int) -> None:
    draw = Random(seed)
    schemas = {f"{index}": random_schema(draw) for index in range(16)}
    outputs = generate(
        *(
            request(name, constraint(grammar.json_schema(schema)), seed=draw.getrandbits(64))
            for name, schema in schemas.items()
        )
    )
    for name, output in outputs.items():
        assert output.end in (EndReason.STOP, EndReason.LENGTH), output.error
        if output.end is EndReason.STOP:
            assert output.tokens[-1] == EOS
            found = json.loads(output.text)
            jsonschema.Draft202012Validator(schemas[name]).validate(found)
            SEEN.add("complete documents")
            SEEN.add("objects", isinstance(found, dict))


FREE: dict[str, Any] = {"temperature": 1.5, "max_tokens": 30, "seed": 5}


def test_free_sequences_in_the_same_batch_are_as_without_it() -> None:
    alone = generate(request("free", None, **FREE), request("greedy", None, temperature=0.0))
    mixed = generate(
        request("r", matching("[a-z ]{20,40}"), max_tokens=60),
        request("free", None, **FREE),
        request("greedy", None, temperature=0.0),
        request("j", constraint(grammar.json_schema({"type": "object"}))),
    )
    for name in ("free", "greedy"):
        assert mixed[name].tokens == alone[name].tokens
    assert re.fullmatch("[a-z ]{20,40}", mixed["r"].text)


PATTERN = r"[a-f]{3,60}!"


@pytest.mark.slow
def test_dealt_pages_change_neither_what_is_allowed_nor_what_stays() -> None:
    """On two ranks that share a sequence's pages: the same output, and a prompt that is pinned."""
    prompt = [40 + i % 60 for i in range(100)]
    made = request("r", matching(PATTERN), prompt, temperature=0.0)
    expected = generate(made)["r"]
    dealt = Engine(config := config_of(kvp=2), ThreadRanks(config))
    pinned = generate_on(dealt, replace(made, pin=PinTerms("tenant", 60.0)))["r"]
    assert (pinned.tokens, pinned.end) == (expected.tokens, EndReason.STOP)
    assert pinned.usage is not None and pinned.usage.pinned_tokens == 96
    arenas = dealt.scheduler.cache.sealed.parts
    assert all(any(key in arena._pinned for key in arena.named) for arena in arenas)
    again = generate_on(dealt, made)["r"]
    assert again.tokens == expected.tokens
    assert again.usage is not None and again.usage.cached_tokens == 96


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.2},
        {"min_p": 0.9},
        {"repetition_penalty": 50.0},
        {"presence_penalty": 100.0, "frequency_penalty": 100.0},
        {"logit_bias": {70: 100.0, 71: 100.0, EOS: 100.0}},
        {"logit_bias": {60: -100.0, 61: -100.0}},
        {"min_tokens": 20},
        {"ignore_eos": True},
        {"ignore_eos": True, "min_tokens": 70},
        {"stop_token_ids": (EOS,), "min_tokens": 30},
        {"logprobs": 3},
    ],
)
def test_the_grammar_holds_whatever_the_parameters(params: dict[str, Any]) -> None:
    output = generate(request("r", matching(PATTERN), **params))["r"]
    assert (output.end, output.error) == (EndReason.STOP, None)
    assert re.fullmatch(PATTERN, output.text)


def test_min_tokens_and_ignore_eos_prolong_what_the_grammar_lets_them() -> None:
    ended = generate(
        request("min", matching("[a-f]*"), min_tokens=25, logit_bias={EOS: 100.0}),
        request("ignore", matching("[a-f]*"), ignore_eos=True, max_tokens=25),
        request("short", matching("[a-f]{2}"), min_tokens=25, ignore_eos=True),
    )
    assert len(ended["min"].tokens) == 26
    assert ended["ignore"].end is EndReason.LENGTH
    assert (ended["short"].end, len(ended["short"].text)) == (EndReason.STOP, 2)


def test_logprobs_are_the_models_own() -> None:
    free = generate(request("free", None, logprobs=2, max_tokens=1))["free"]
    bound = generate(request("bound", matching("[0-9]"), logprobs=2, max_tokens=1))["bound"]
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert bound.logprobs[0].logprob < bound.logprobs[0].top[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("received", range(0, 30, 3))
def test_a_resumed_sequence_continues_as_if_nothing_had_happened(received: int) -> None:
    bound = constraint(
        grammar.after_reasoning(
            grammar.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 5}),
            Reasoning("<t>", "</t>", started=True),
            grammar.literal,
        ),
        Reasoning("<t>", "</t>", started=True, max_tokens=6),
    )
    params: dict[str, Any] = {"seed": 3, "max_tokens": 60, "repetition_penalty": 1.3}
    whole = generate(request("whole", bound, **params))["whole"]
    assert len(whole.tokens) > received
    resumed = generate(request("r", bound, resumed=whole.tokens[:received], **params))["r"]
    assert whole.tokens[:received] + resumed.tokens == whole.tokens
    assert resumed.end == whole.end


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("started", [True, False])
def test_reasoning_is_ended_after_its_tokens(max_tokens: int, started: bool) -> None:
    reasoning = Reasoning("<t>", "</t>", started=started, max_tokens=max_tokens)
    start = [] if started else tokenizer().encode("\n<t>", add_special_tokens=False)
    end = tokenizer().encode("</t>", add_special_tokens=False)
    # Text that does not end by itself; the bias keeps the marker from coming by chance.
    free = OutputConstraint("", reasoning)
    slash = tokenizer().encode("/", add_special_tokens=False)[0]
    made = request("r", free, resumed=start, max_tokens=40, logit_bias={slash: -100.0})
    tokens = generate(made)["r"].tokens
    # At the first token that completes a character.
    forced = next(i for i in range(max_tokens, max_tokens + 4) if tokens[i : i + len(end)] == end)
    assert forced == max_tokens or "\ufffd" in tokenizer().decode(tokens[:max_tokens])
    assert "</t>" not in tokenizer().decode(tokens[forced + len(end) :])


def test_without_reasoning_nothing_is_ended() -> None:
    reasoning = Reasoning("<t>", "</t>", started=False, max_tokens=0)
    answer = tokenizer().encode("No", add_special_tokens=False)
    made = request("r", OutputConstraint("", reasoning), resumed=answer, max_tokens=20)
    free = request("free", None, resumed=answer, max_tokens=20)
    outputs = generate(made, free)
    assert outputs["r"].tokens == outputs["free"].tokens


def test_the_answer_follows_the_reasoning_within_its_grammar() -> None:
    reasoning = Reasoning("<t>", "</t>", started=False, max_tokens=8)
    found = grammar.after_reasoning(grammar.regex("[0-9]{4}"), reasoning, grammar.literal)
    for seed in range(8):
        made = request("r", constraint(found, reasoning), seed=seed)
        output = generate(made)["r"]
        assert output.end is EndReason.STOP
        assert re.fullmatch(r"(?s:[ \n]*<t>.*?</t>\n*)?[0-9]{4}", output.text), output.text


def test_a_grammar_that_cannot_be_compiled_ends_its_sequence_alone() -> None:
    outputs = generate(
        request("bad", OutputConstraint("start: (")),
        request("good", matching("[a-c]{4}")),
        request("free", None, max_tokens=5),
    )
    assert outputs["bad"].end is EndReason.FAULT
    assert "structured_output: cannot be enforced" in (outputs["bad"].error or "")
    assert re.fullmatch("[a-c]{4}", outputs["good"].text)
    assert len(outputs["free"].tokens) == 5


def test_a_grammar_that_becomes_too_expensive_ends_its_sequence_alone() -> None:
    outputs = generate(
        request("bad", matching(r"(?:[a-z]{1,500}){1,500}z"), max_tokens=400),
        request("good", matching("[a-c]{4}")),
    )
    assert outputs["bad"].end is EndReason.FAULT
    assert "cannot be continued within its grammar" in (outputs["bad"].error or "")
    assert re.fullmatch("[a-c]{4}", outputs["good"].text)


def test_what_follows_no_longer_than_the_grammar_compiles_can_be_aborted() -> None:
    from tests.workers.structured.tiny import engine

    made = request("gone", matching("[a-z]{50}"))
    engine().add(made)
    delta = engine().abort("gone")
    assert delta is not None
    assert delta.finish_reason is EndReason.ABORT
    assert not engine().has_work
    assert generate(request("next", matching("[a-z]{3}")))["next"].end is EndReason.STOP


def test_a_grammar_that_fails_after_its_sequence_has_left_is_forgotten() -> None:
    from tests.workers.structured.tiny import engine

    engine().add(request("gone", OutputConstraint("start: (")))
    assert engine().abort("gone") is not None
    outputs = generate(request("next", matching("[a-z]{3}")))
    assert [*outputs] == ["next"] and outputs["next"].end is EndReason.STOP


NAMES = (f"n{index}" for index in count())


@pytest.mark.parametrize(
    ("values", "greedy"), [(["yes", "no"], True), (["", "x"], False), (['"', "\n\\"], False)]
)
def test_one_of_the_choices_comes(values: list[str], greedy: bool) -> None:
    name = next(NAMES)
    temperature = 0.0 if greedy else 1.5
    made = request(name, constraint(grammar.choice(values)), temperature=temperature)
    assert generate(made)[name].text in values


def test_special_tokens_and_padding_are_never_text() -> None:
    biased = dict.fromkeys([0, 1], 100.0)  # padding cannot be asked for
    made = request("r", matching("(?s:.{5,20})"), logit_bias=biased)
    output = generate(made)["r"]
    assert output.tokens[-1] == EOS
    assert not set(output.tokens[:-1]) & {*biased, EOS}
    assert max(output.tokens) < tokenizer().vocab_size
    assert PROMPT
