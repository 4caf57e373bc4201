"""kvmesh.LLM on a tiny model: results, arguments, errors."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import kvmesh
from kvmesh import (
    LLM,
    BatchError,
    Completion,
    ConfigError,
    InvalidRequestError,
    KVMeshError,
    NeverFitsError,
    SamplingParams,
    UnknownOptionError,
)
from kvmesh.cluster.ingress import prompts
from kvmesh.cluster.ingress.answers import planner
from kvmesh.cluster.ingress.answers.plan import plan_answer
from kvmesh.cluster.offline.arguments import offline_config
from tests.cluster.offline.tiny_llm import GREEDY, tiny_llm
from tests.workers.structured.tiny import PADDING, model_path, tokenizer

PROMPTS = ("The pages of a sequence", "Würde", "ranks agree on every sum", "x")
TOO_LONG = "z" * 3000
CHAT = [{"role": "user", "content": "The ranks?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def ids_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.choices[0].token_ids for completion in completions]


@cache
def model() -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    found.generation_config.eos_token_id = None
    return found


def continued(prompt: str, tokens: int) -> tuple[int, ...]:
    """What transformers generates, greedily."""
    ids = torch.tensor([tokenizer().encode(prompt)])
    size = model().config.vocab_size
    no_tokens = list(range(size - PADDING, size))
    out = model().generate(ids, max_new_tokens=tokens, do_sample=False, suppress_tokens=no_tokens)
    return tuple(out[0, ids.shape[1] :].tolist())


def test_greedy_output_is_that_of_transformers(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, **GREEDY)
    assert ids_of(llm.generate(PROMPTS, params)) == [continued(x, 20) for x in PROMPTS]


def test_results_are_in_order_and_as_alone(llm: LLM) -> None:
    lengths = (40, 1, 25, 7, 1, 33, 2, 16)
    prompts = [f"{PROMPTS[n % 4]} {n}" for n in range(len(lengths))]
    params = [SamplingParams(max_tokens=x, seed=x, ignore_eos=True) for x in lengths]
    together = llm.generate(prompts, params)
    assert [found.usage.completion_tokens for found in together] == list(lengths)
    alone = [llm.generate(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    assert ids_of(together) == ids_of(alone)


def test_a_prompt_may_be_text_ids_or_a_chat(llm: LLM) -> None:
    ids = tokenizer().encode(PROMPTS[0])
    alike: list[Any] = [PROMPTS[0], ids, torch.tensor(ids).numpy(), tuple(ids)]
    assert len(set(ids_of(llm.generate(alike, max_tokens=5, **GREEDY)))) == 1
    for one in alike:
        assert isinstance(llm.generate(one, max_tokens=1, **GREEDY), Completion)
    answers = llm.chat([CHAT, CHAT], max_tokens=6, **GREEDY)
    answers += [llm.chat(CHAT, max_tokens=6, **GREEDY)]
    answers += llm.generate([CHAT], max_tokens=6, **GREEDY)
    assert len(set(ids_of(answers))) == 1
    assert answers[0].usage.prompt_tokens > len(tokenizer().encode("The ranks?"))


@pytest.mark.parametrize("grammars", [False, True])
def test_any_number_waits_for_a_thread(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, grammars: bool
) -> None:
    """Long texts, or grammars, that all have come before the first is done."""
    number, asked, all_asked = 80, itertools.count(1), threading.Event()

    def noted(ask: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        async def note_and_ask(*args: Any) -> Any:
            if next(asked) == number:
                all_asked.set()
            return await ask(*args)

        return note_and_ask

    def held(work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: all_asked.wait(60) and work(*args)

    ingress = llm._cluster.ingress
    if grammars:
        monkeypatch.setattr(ingress._planner, "plan", noted(ingress._planner.plan))
        monkeypatch.setattr(planner, "plan_answer", held(plan_answer))
    else:
        codec = ingress._prompts._codec
        monkeypatch.setattr(prompts, "LONG_TEXT_CHARS", 1)
        monkeypatch.setattr(ingress._prompts, "encode", noted(ingress._prompts.encode))
        monkeypatch.setattr(codec, "encode", held(codec.encode))
    monkeypatch.setattr(llm, "_at_once", number)
    each = [SamplingParams(max_tokens=1) for _ in range(number)]
    if grammars:
        each = [SamplingParams(structured_output={"regex": f"a{n}"}) for n in range(number)]
    assert len(llm.generate(["x"] * number, each)) == number


def test_nothing_gives_nothing(llm: LLM) -> None:
    found: list[Any] = [llm.generate([]), llm.chat([]), llm.score([]), list(llm.iterate([]))]
    assert found == [[], [], [], []]


def test_options_mean_what_they_do_in_the_sdk(llm: LLM) -> None:
    found = llm.generate(PROMPTS[0], n=3, seed=5, max_tokens=8, logprobs=2, ignore_eos=True)
    assert len({choice.token_ids for choice in found.choices}) == 3
    assert all(len(token.top) == 2 for token in found.choices[2].logprobs)
    (again,) = llm.generate([PROMPTS[0]], n=3, seed=5, max_tokens=8, ignore_eos=True)
    assert [x.token_ids for x in again.choices] == [x.token_ids for x in found.choices]
    text = llm.generate(PROMPTS[0], max_tokens=30, **GREEDY).text
    stopped = llm.generate([PROMPTS[0]], max_tokens=30, stop=text[4:6], **GREEDY)[0]
    assert stopped.text == text[: text.index(text[4:6])]
    assert stopped.choices[0].matched_stop == text[4:6]


def test_output_has_the_structure_that_was_asked_for(llm: LLM) -> None:
    found = llm.generate(
        [*PROMPTS, CHAT], structured_output={"json_schema": SCHEMA}, max_tokens=200, seed=1
    )
    for completion in found:
        if completion.choices[0].finish_reason is kvmesh.FinishReason.STOP:
            assert isinstance(json.loads(completion.text)["a"], int)
        else:  # an integer without an end
            assert re.match(r'\s*\{\s*"a"\s*:\s*-?[0-9]*', completion.text)
    assert any(x.choices[0].finish_reason is kvmesh.FinishReason.STOP for x in found)


def test_a_stream_gives_the_same_in_pieces(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], max_tokens=20, **GREEDY)
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=20, **GREEDY))
    assert "".join(delta.text for delta in stream) == whole.text
    assert stream.completion.choices == whole.choices
    (*_, last) = llm.stream(CHAT, max_tokens=3, **GREEDY)
    assert last.finish_reason is kvmesh.FinishReason.LENGTH


def test_a_stream_that_nothing_refers_to_ends(llm: LLM) -> None:
    def aborted() -> int:
        return llm.client.loads().groups[0].outcomes_total.get("abort", 0)

    before = aborted()
    next(llm.stream(PROMPTS[0], max_tokens=400, **GREEDY))
    assert idle(llm)
    assert aborted() == before + 1


# Errors


def test_a_prompt_that_fails_does_not_end_the_others(llm: LLM) -> None:
    prompts = [PROMPTS[0], TOO_LONG, PROMPTS[1]]
    with pytest.raises(BatchError, match="1 of 3 in the batch failed; the first is number 1") as it:
        llm.generate(prompts, max_tokens=4, **GREEDY)
    error = it.value
    assert [type(found) for found in error.results] == [Completion, NeverFitsError, Completion]
    assert error.reason == "NEVER_FITS" and error.needed_bytes
    assert len(pickle.loads(pickle.dumps(error)).results) == 3
    returned = llm.generate(prompts, max_tokens=4, on_error="return", **GREEDY)
    assert [isinstance(found, KVMeshError) for found in returned] == [False, True, False]
    with pytest.raises(NeverFitsError):
        llm.generate(TOO_LONG)


def test_an_error_while_iterating_comes_in_its_place(llm: LLM) -> None:
    results = llm.iterate([PROMPTS[0], TOO_LONG, PROMPTS[1]], max_tokens=4)
    assert isinstance(next(results), Completion)
    with pytest.raises(NeverFitsError) as caught:
        next(results)
    assert caught.value.__notes__ == ["it is number 1 in the batch"]
    assert list(results) == []


@pytest.mark.parametrize(
    ("call", "kind", "field"),
    [
        (lambda llm: llm.generate("x", temprature=1), UnknownOptionError, "temprature"),
        (lambda llm: llm.generate(["x"], temprature=1), UnknownOptionError, "temprature"),
        (lambda llm: llm.generate("x", tools=[]), UnknownOptionError, "tools"),
        (lambda llm: llm.generate(5), InvalidRequestError, "prompts"),
        (lambda llm: llm.generate(b"x"), InvalidRequestError, "prompt"),
        (lambda llm: llm.generate(["x"], [{}, {}]), InvalidRequestError, "sampling_params"),
        (lambda llm: llm.generate(iter("xy"), [{}]), InvalidRequestError, "sampling_params"),
        (lambda llm: llm.generate(["x"], iter([{}, {}])), InvalidRequestError, "sampling_params"),
        (lambda llm: llm.generate(["x"], object()), InvalidRequestError, "sampling_params"),
        (lambda llm: llm.generate("x", [{}]), InvalidRequestError, "sampling_params"),
        (lambda llm: llm.generate(["x"], on_error="skip"), InvalidRequestError, "on_error"),
        (lambda llm: llm.generate("x", temperature=-1), InvalidRequestError, "sampling_params."),
        (lambda llm: llm.chat("hello"), InvalidRequestError, "messages"),
        (lambda llm: llm.chat({"role": "user"}), InvalidRequestError, "messages"),
        (lambda llm: llm.iterate("text"), InvalidRequestError, "prompts"),
        (lambda llm: llm.score("x", [1]), InvalidRequestError, "continuations"),
        (lambda llm: llm.score("x", ""), InvalidRequestError, "continuations"),
        (lambda llm: llm.score("", "x"), InvalidRequestError, "continuations"),
        (lambda llm: llm.score(["x"], "y"), InvalidRequestError, "continuations"),
        (lambda llm: llm.score(["x"], ["y", "z"]), InvalidRequestError, "continuations"),
    ],
)
def test_wrong_arguments_are_named(
    llm: LLM, call: Callable[[LLM], Any], kind: type[KVMeshError], field: str
) -> None:
    with pytest.raises(kind) as caught:
        call(llm)
    assert str(caught.value.field).startswith(field)


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"quant_policy": 5}, "quant_policy", "must be 0, 4, 8 or 42"),
        ({"quant_policy": 8, "kv_format": "int8"}, "quant_policy", "cannot be combined"),
        ({"kv_format": "int9"}, "kv_format", "did you mean int8?"),
        ({"kv_fromat": "int8"}, "kv_fromat", "did you mean kv_format?"),
        ({"max_num_seqs": 0}, "max_num_seqs", "greater than or equal to 1"),
        ({"tp": 3}, "engine.tp", "must divide the 4 KV heads"),
        ({"config": "/nowhere.yaml"}, "config", "cannot read /nowhere.yaml"),
        ({"config": {"ingress": {"prot": 1}}}, "ingress.prot", "did you mean ingress.port?"),
        ({"model": "/nowhere"}, "model", "is not a model"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        LLM(**{"model": model_path(), **settings})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("policy", "kv_format"),
    [(0, "exact"), (4, "int4"), (8, "int8"), (42, "k4v2"), (None, "default")],
)
def test_a_quant_policy_is_a_kv_format(policy: int | None, kv_format: str) -> None:
    found = offline_config(None, None, None, policy, {})
    assert found.engine.kv_format == kv_format


def test_a_file_of_settings_is_used_and_arguments_come_first(tmp_path: Any) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "engine: {kv_format: int8, max_num_seqs: 3, kv_probe: off, page_size: 16}\n"
        "ingress: {default_max_tokens: 7, port: 1}\ngroups: [{}, {}]\n"
        "generation: {temperature: 0}\n"
    )
    with tiny_llm(config=file, kv_format="exact", max_num_seqs=None) as made:
        found = made.generate("x", ignore_eos=True)
        assert (found.usage.kv_format, found.usage.completion_tokens) == ("exact", 7)
        (group,) = made.client.groups()
        assert group.max_num_seqs == 3
        assert found.choices == made.generate("x", ignore_eos=True, temperature=0.0).choices


# Scores


def test_scores_are_those_of_transformers(llm: LLM) -> None:
    text = "The ranks agree on every sum, and the pages are dealt"
    ids = tokenizer().encode(text)
    with torch.no_grad():
        logits = model()(torch.tensor([ids])).logits[0, :, :-PADDING]
    logprobs = logits.log_softmax(-1)
    expected = [float(logprobs[at, token]) for at, token in enumerate(ids[1:])]
    score = llm.score(text)
    assert [x.chosen.logprob for x in score.tokens] == pytest.approx(expected, abs=1e-4)
    assert score.logprob == pytest.approx(sum(expected), abs=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)
    assert not score.greedy
    by_ids = llm.score([ids, ids[:4]])
    assert by_ids[0] == score and len(by_ids[1].tokens) == 3


def test_a_continuation_alone_is_scored(llm: LLM) -> None:
    prompt, continuation = "The ranks agree", " on every sum"
    whole = llm.score(prompt + continuation)
    score = llm.score(prompt, continuation)
    assert score.tokens == whole.tokens[-len(score.tokens) :]
    assert score.prompt_tokens + len(score.tokens) == len(tokenizer().encode(prompt + continuation))
    assert "".join(token.chosen.text for token in score.tokens) == continuation
    ids = tokenizer().encode(prompt)
    greedy = llm.generate(ids, max_tokens=5, **GREEDY).choices[0].token_ids
    first, second = llm.score([ids, ids], [greedy, greedy[::-1]])
    assert first.greedy and not second.greedy
    assert first.logprob > second.logprob


def test_a_token_of_both_texts_counts_as_the_continuations(llm: LLM) -> None:
    """The tokenizer has one for ` ran`."""
    assert len(tokenizer().encode(" ran")) < len([*tokenizer().encode(" r"), *b"an"])
    score = llm.score("The r", "an")
    assert "".join(token.chosen.text for token in score.tokens).endswith("an")
    assert score.prompt_tokens < len(tokenizer().encode("The r"))
    with pytest.raises(InvalidRequestError, match="begins in the first token"):
        llm.score(" r", "an")


def test_a_continuation_of_nothing_has_a_token_that_nothing_predicts(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="begins in the first token"):
        llm.score("", "an")
    (found,) = llm.score([[]], [[1, 2, 3]], on_error="return")
    assert isinstance(found, InvalidRequestError) and "begins in the first token" in str(found)


# Many prompts


def test_prompts_are_taken_as_others_are_done(llm: LLM) -> None:
    taken = 0

    def prompts() -> Iterator[str]:
        nonlocal taken
        for taken in itertools.count(1):
            yield f"prompt {taken}"

    results = llm.iterate(prompts(), max_tokens=2, **GREEDY)
    for _ in range(40):
        assert isinstance(next(results), Completion)
    assert 40 <= taken <= 40 + 16 * 8
    results.close()  # type: ignore[attr-defined]
    assert idle(llm)


def idle(llm: LLM) -> bool:
    """Wait until nothing runs."""
    while True:
        loads = llm.client.loads()
        if not loads.groups[0].running and not loads.router.leases:
            return True
