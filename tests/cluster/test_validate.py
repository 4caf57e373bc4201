"""Validation of requests: every bad input is refused with the name of its field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmesh.cluster.errors import OversizedRequestError, UnsupportedFieldError
from kvmesh.cluster.grpc_front import parse
from kvmesh.cluster.ingress.chat import conversation
from kvmesh.cluster.ingress.choice import choice_seed
from kvmesh.cluster.ingress.model_checks import check_tokens, fit_context
from kvmesh.cluster.ingress.prompts import cache_salt
from kvmesh.cluster.ingress.resume import Resume, ResumedChoice
from kvmesh.cluster.ingress.structured import answer_spec
from kvmesh.cluster.ingress.validate import (
    GenerationSpec,
    Limits,
    TextRules,
    check_size,
    generation_spec,
)
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import Conversation
from kvmesh.workers.model.generation_defaults import DefaultSampling
from kvmesh.workers.request import TokenIds
from kvmesh.workers.sampling_params import SamplingParams
from tests.exercised import Exercised

LIMITS = Limits()
VOCAB = 100
CONTEXT = 64
NAN, INF = float("nan"), float("inf")


def make_request(prompt: pb.Prompt | None = None, /, **params: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=pb.Prompt(text="hello") if prompt is None else prompt,
        sampling_params=pb.SamplingParams(**params),
    )


def tokens(*ids: int) -> pb.Prompt:
    return pb.Prompt(token_ids=pb.TokenIds(ids=ids))


def chat(*turns: tuple[str, str]) -> pb.Prompt:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Prompt(chat=pb.Chat(messages=messages))


def validated(request: pb.GenerateRequest, limits: Limits = LIMITS) -> GenerationSpec:
    """Run all checks of a request, for a model of VOCAB tokens and a context of CONTEXT."""
    spec = generation_spec(request, limits)
    ids = encoded(spec)
    check_tokens(spec, ids, VOCAB)
    if ids.size < CONTEXT:
        fit_context(spec, ids.size, CONTEXT)
    return spec


def encoded(spec: GenerationSpec) -> TokenIds:
    if isinstance(spec.prompt, np.ndarray):
        return spec.prompt
    text = (
        spec.prompt
        if isinstance(spec.prompt, str)
        else "".join(m["content"] for m in spec.prompt.messages)
    )
    return np.arange(len(text), dtype=np.int32) % VOCAB


def field_of(request: pb.GenerateRequest, limits: Limits = LIMITS) -> str:
    with pytest.raises(InvalidFieldError) as caught:
        validated(request, limits)
    assert caught.value.message
    return caught.value.field


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (pb.Prompt(), "prompt"),
        (pb.Prompt(text=""), "prompt.text"),
        (tokens(), "prompt.token_ids"),
        (chat(), "prompt.chat.messages"),
        (chat(("user", "")), "prompt.chat.messages"),
        (chat(("user", "hi"), ("", "hi")), "prompt.chat.messages[1].role"),
        (chat(*[("user", "hi")] * 10_001), "prompt.chat.messages"),
        (tokens(1, 2, VOCAB), "prompt.token_ids.ids[2]"),
        (tokens(1, 2**31 - 1), "prompt.token_ids.ids[1]"),
        (tokens(1, 2**31), "prompt.token_ids"),
        (tokens(2**32 - 1), "prompt.token_ids"),
    ],
)
def test_a_wrong_prompt_is_refused(prompt: pb.Prompt, field: str) -> None:
    assert field_of(make_request(prompt)) == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"adapter": "a"}, "adapter"),
    ],
)
def test_fields_ahead_of_their_support_are_refused_by_name(
    fields: Mapping[str, Any], field: str
) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        validated(pb.GenerateRequest(prompt=pb.Prompt(text="A"), **fields))
    assert caught.value.field == field


def test_a_request_without_any_prompt_is_refused() -> None:
    assert field_of(pb.GenerateRequest()) == "prompt"


def test_a_prompt_that_has_no_tokens_is_refused() -> None:
    spec = generation_spec(make_request(), LIMITS)
    with pytest.raises(InvalidFieldError, match="prompt: must have at least one token"):
        check_tokens(spec, np.zeros(0, np.int32), VOCAB)


@pytest.mark.parametrize("value", [-0.5, NAN, INF, -INF, 1e9])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_a_parameter_out_of_range_is_refused(name: str, value: float) -> None:
    assert field_of(make_request(**{name: value})) == f"sampling_params.{name}"


@pytest.mark.parametrize("value", [-100.5, NAN, INF, 100.5])
@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_out_of_range_is_refused(name: str, value: float) -> None:
    assert field_of(make_request(**{name: value})) == f"sampling_params.{name}"


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 17}, "n"),
        ({"logit_bias": {3: NAN}}, "logit_bias"),
        ({"logit_bias": {3: 101.0}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"stop_token_ids": [2**32 - 1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", "x" * 1025]}, "stop[1]"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"max_tokens": 2**31 - 1}, "max_tokens"),
        ({"min_tokens": CONTEXT}, "min_tokens"),
    ],
)
def test_a_wrong_parameter_is_refused(params: dict[str, object], name: str) -> None:
    assert field_of(make_request(**params)) == f"sampling_params.{name}"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "a\x00"}, "request_id"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": -1.0}, "timeout_s"),
        ({"timeout_s": NAN}, "timeout_s"),
        ({"timeout_s": INF}, "timeout_s"),
        ({"timeout_s": 1e12}, "timeout_s"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"pin_s": -1.0}, "pin_s"),
        ({"pin_s": 86401.0}, "pin_s"),
        ({"pin_s": float("nan")}, "pin_s"),
    ],
)
def test_a_wrong_field_of_the_request_is_refused(changes: dict[str, object], field: str) -> None:
    request = make_request()
    request.MergeFrom(pb.GenerateRequest(**changes))  # type: ignore[arg-type]
    assert field_of(request) == field


@pytest.mark.parametrize(
    ("choices", "field"),
    [
        ([pb.ResumedChoice(index=2)], "resume.choices[0].index"),
        ([pb.ResumedChoice(index=1), pb.ResumedChoice(index=1)], "resume.choices[1].index"),
        ([pb.ResumedChoice(index=1, token_ids=[VOCAB])], "resume.choices[0].token_ids"),
        (
            [pb.ResumedChoice(index=1), pb.ResumedChoice(index=0, token_ids=[2**32 - 1])],
            "resume.choices[1].token_ids",
        ),
    ],
)
def test_a_wrong_cursor_is_refused(choices: list[pb.ResumedChoice], field: str) -> None:
    request = make_request(n=2)
    request.resume.choices.extend(choices)
    assert field_of(request) == field


# Defaults


def test_defaults() -> None:
    spec, other = validated(make_request()), validated(make_request())
    params = SamplingParams(seed=spec.params.seed, max_tokens=LIMITS.default_max_tokens)
    assert spec == GenerationSpec(
        request_id=spec.request_id,
        prompt="hello",
        params=params,
        max_tokens_given=False,
        rules=TextRules(),
    )
    assert len(bytes.fromhex(spec.request_id)) == 16
    assert spec.request_id != other.request_id
    assert spec.params.seed != other.params.seed


def test_a_random_seed_has_all_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: 2**bits - 1)
    assert generation_spec(make_request(), LIMITS).params.seed == 2**64 - 1


def test_a_models_defaults_are_for_what_a_request_leaves_open() -> None:
    defaults = DefaultSampling(temperature=0.25, top_p=0.5)
    params = generation_spec(make_request(top_p=0.75), LIMITS, defaults).params
    assert (params.temperature, params.top_p) == (0.25, 0.75)


PARAMETERS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "seed": 2**64 - 1,
    "max_tokens": 9,
    "min_tokens": 3,
    "stop_token_ids": (5, 6),
    "ignore_eos": True,
    "logit_bias": {4: -1.5},
    "logprobs": 2,
    "prompt_logprobs": 1,
}


def test_every_field_of_a_request_reaches_its_specification() -> None:
    request = make_request(
        chat(("user", "hi")),
        n=2,
        stop=["a", "bc"],
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        max_reasoning_tokens=11,
        **PARAMETERS,
    )
    assert {field.name for field, _ in request.sampling_params.ListFields()} == {
        field.name for field in pb.SamplingParams.DESCRIPTOR.fields
    }
    request.prompt.chat.tools.add(name="f", parameters_json="{}")
    had = pb.ResumedChoice(index=1, token_ids=[8], text_chars=1)
    rest = pb.GenerateRequest(
        request_id="näme",
        priority=-3,
        timeout_s=12.0,
        cache_salt="salt",
        pin_s=60.0,
        resume=pb.Resume(model_revision="v", choices=[had], prompt_logprobs_received=1),
    )
    request.MergeFrom(rest)
    spec = generation_spec(request, LIMITS)
    assert isinstance(spec.prompt, Conversation)
    assert spec == GenerationSpec(
        request_id="näme",
        prompt=conversation(request.prompt.chat),
        params=SamplingParams(**PARAMETERS, output_optional=True),
        n=2,
        rules=TextRules(("a", "bc"), skip_special_tokens=False, include_stop=True),
        priority=-3,
        timeout_s=12.0,
        cache_salt="salt",
        pin_s=60.0,
        resume=Resume("v", (ResumedChoice(), ResumedChoice((8,), 1)), 1),
        answer=answer_spec(request, spec.prompt),
    )
    assert spec.answer.is_chat and spec.answer.tools
    assert spec.answer.max_reasoning_tokens == 11


@pytest.mark.parametrize(("given", "parallel"), [(None, True), (True, True), (False, False)])
def test_calls_may_be_parallel_unless_the_request_says_otherwise(
    given: bool | None, parallel: bool
) -> None:
    messages = [pb.ChatMessage(role="user", content="hi")]
    chat = pb.Chat(messages=messages, parallel_tool_calls=given)
    spec = generation_spec(make_request(pb.Prompt(chat=chat)), LIMITS)
    assert spec.answer.parallel is parallel


def test_the_largest_values_are_accepted() -> None:
    request = make_request(
        tokens(2**31 - 1), n=16, stop=["x" * 1024] * 16, max_tokens=2**31 - 1, stop_token_ids=[1]
    )
    rest = pb.GenerateRequest(request_id="x" * 128, cache_salt="x" * 256, pin_s=86400.0)
    request.MergeFrom(rest)
    spec = generation_spec(request, LIMITS)
    assert isinstance(spec.prompt, np.ndarray)
    assert spec.prompt.dtype == np.int32
    assert spec.prompt.tolist() == [2**31 - 1]
    assert (spec.n, spec.params.max_tokens) == (16, 2**31 - 1)
    check_size(1000, Limits(max_request_bytes=1000))
    with pytest.raises(OversizedRequestError, match=r"^request: must have at most 1,000 bytes"):
        check_size(1001, Limits(max_request_bytes=1000))


@pytest.mark.parametrize(("pin_s", "n", "field"), [(0.0, 1, ""), (9.0, 1, ""), (9.0, 2, "n"),
                                                   (None, 1, "max_tokens")])  # fmt: skip
def test_a_prompt_may_be_pinned_without_any_output(pin_s: float | None, n: int, field: str) -> None:
    request = make_request(max_tokens=0, n=n)
    if pin_s is not None:
        request.pin_s = pin_s
    if field:
        assert field_of(request) == f"sampling_params.{field}"
    else:
        assert generation_spec(request, LIMITS).params.max_tokens == 0
    assert generation_spec(make_request(max_tokens=1, n=2), LIMITS).n == 2


def test_a_default_max_tokens_is_raised_to_min_tokens_and_lowered_to_the_context() -> None:
    assert generation_spec(make_request(min_tokens=900), LIMITS).params.max_tokens == 900
    spec = generation_spec(make_request(), LIMITS)
    assert fit_context(spec, 10, CONTEXT).max_tokens == CONTEXT - 10
    assert fit_context(spec, 10, 10_000).max_tokens == LIMITS.default_max_tokens


def test_max_tokens_up_to_the_context_are_accepted() -> None:
    spec = generation_spec(make_request(max_tokens=CONTEXT - 5), LIMITS)
    assert fit_context(spec, 5, CONTEXT).max_tokens == CONTEXT - 5
    with pytest.raises(InvalidFieldError, match="must be at most 58"):
        fit_context(spec, 6, CONTEXT)


def test_greedy_with_one_choice_and_zero_valued_parameters_are_accepted() -> None:
    params = validated(make_request(temperature=0.0, n=1, seed=0, logprobs=0, min_tokens=0)).params
    assert params.greedy
    assert params.seed == 0
    assert params.logprobs == 0


def test_a_servers_time_limit_bounds_the_requests() -> None:
    limits = Limits(max_timeout_s=5.0)
    assert generation_spec(make_request(), limits).timeout_s == 5.0
    request = make_request()
    request.timeout_s = 9.0
    assert generation_spec(request, limits).timeout_s == 5.0
    request.timeout_s = 2.0
    assert generation_spec(request, limits).timeout_s == 2.0


@given(seed=st.integers(0, 2**64 - 1))
def test_every_choice_has_its_own_seed(seed: int) -> None:
    seeds = [choice_seed(seed, index) for index in range(16)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 16
    assert all(0 <= value < 2**64 for value in seeds)


# Any input gives a valid specification, or an error that names a field

T = TypeVar("T")


def mostly(usual: st.SearchStrategy[T], odd: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """A message has many fields, so each of them must be valid most of the time."""
    return st.integers(0, 15).flatmap(lambda drawn: odd if drawn == 7 else usual)


numbers = mostly(st.sampled_from([0.5, 1.0]), st.floats())
int32 = mostly(st.integers(0, 8), st.integers(-(2**31), 2**31 - 1))
uint32 = mostly(st.integers(0, VOCAB - 1), st.integers(0, 2**32 - 1))
ids = st.lists(uint32, max_size=6)
text = mostly(st.text(min_size=1, max_size=12), st.text(max_size=12))


def messages(
    kind: Callable[..., pb.GenerateRequest | object],
    always: Mapping[str, st.SearchStrategy[object]] | None = None,
    /,
    **fields: Any,
) -> st.SearchStrategy[object]:
    """Messages with any of the fields set."""
    return st.fixed_dictionaries(dict(always or {}), optional=fields).map(
        lambda given: kind(**given)
    )


prompts = st.one_of(
    st.builds(pb.Prompt, text=text),
    st.builds(pb.Prompt, token_ids=st.builds(pb.TokenIds, ids=ids)),
    st.builds(
        pb.Prompt,
        chat=st.builds(
            pb.Chat,
            messages=st.lists(st.builds(pb.ChatMessage, role=text, content=text), max_size=3),
        ),
    ),
    st.builds(pb.Prompt, text=st.just("A")),
    st.just(pb.Prompt()),
)
parameters = messages(
    pb.SamplingParams,
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ),
        numbers,
    ),
    **dict.fromkeys(("top_k", "max_tokens", "min_tokens", "logprobs", "n"), int32),
    seed=st.integers(0, 2**64 - 1),
    skip_special_tokens=st.booleans(),
    include_stop_str_in_output=st.booleans(),
    stop=st.lists(text, max_size=20),
    stop_token_ids=ids,
    ignore_eos=st.booleans(),
    logit_bias=st.dictionaries(uint32, numbers, max_size=4),
)
resumes = messages(
    pb.Resume,
    choices=st.lists(
        messages(
            pb.ResumedChoice,
            index=uint32,
            token_ids=ids,
            text_chars=st.integers(0, 2**64 - 1),
            finished=st.booleans(),
        ),
        max_size=3,
    ),
    model_revision=text,
)
requests = messages(
    pb.GenerateRequest,
    {"prompt": prompts},
    request_id=text,
    model=text,
    sampling_params=parameters,
    priority=int32,
    timeout_s=numbers,
    allowed_kv_formats=st.lists(text, max_size=2),
    max_kv_divergence_nats=numbers,
    adapter=mostly(st.just(""), st.just("a")),
    cache_salt=text,
    pin_s=numbers,
    resume=resumes,
)


def outcome(request: pb.GenerateRequest) -> GenerationSpec | InvalidFieldError:
    try:
        return validated(request)
    except InvalidFieldError as error:
        return error


SEEN = Exercised("requests", {"valid": 100, "refused": 100, "refused below the request": 100})


def check_names_a_field(error: InvalidFieldError) -> None:
    assert error.message
    if error.field == "request":
        return
    message: Descriptor | None = pb.GenerateRequest.DESCRIPTOR
    for part in error.field.split("."):
        name = part.partition("[")[0]
        assert message is not None
        assert name in message.fields_by_name, error.field
        message = message.fields_by_name[name].message_type


def check_bytes(data: bytes) -> None:
    try:
        request = parse(pb.GenerateRequest, data, LIMITS)
    except InvalidFieldError as error:
        check_names_a_field(error)
        return
    assert isinstance(request, pb.GenerateRequest)
    check_valid_or_names_a_field(request)


def check_valid_or_names_a_field(request: pb.GenerateRequest) -> None:
    spec = outcome(request)
    SEEN.add("refused" if isinstance(spec, InvalidFieldError) else "valid")
    if isinstance(spec, InvalidFieldError):
        SEEN.add("refused below the request", "." in spec.field)
        check_names_a_field(spec)
        return
    assert 1 <= spec.n <= LIMITS.max_choices
    assert spec.request_id
    assert len(spec.rules.stop) <= LIMITS.max_stop_strings
    assert all(0 < len(stop) <= LIMITS.max_stop_chars for stop in spec.rules.stop)
    assert spec.timeout_s is None or 0 < spec.timeout_s <= 30 * 86400
    assert spec.resume is None or len(spec.resume.choices) == spec.n
    ids = encoded(spec)
    assert ids.dtype == np.int32
    assert ids.size > 0
    if isinstance(spec.prompt, np.ndarray):
        assert int(ids.min()) >= 0
        assert int(ids.max()) < VOCAB
    if ids.size < CONTEXT:
        params = fit_context(spec, ids.size, CONTEXT)
        assert params.min_tokens <= params.max_tokens <= CONTEXT - ids.size


@SEEN.required
@settings(max_examples=600, deadline=None)
@given(request=requests)
def test_any_request_is_valid_or_names_a_field(request: pb.GenerateRequest) -> None:
    check_valid_or_names_a_field(request)


@settings(max_examples=300, deadline=None)
@given(request=requests, data=st.data())
def test_a_damaged_request_is_valid_or_names_a_field(request: object, data: st.DataObject) -> None:
    assert isinstance(request, pb.GenerateRequest)
    wire = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(wire)))
        wire[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    check_bytes(bytes(wire))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
@example(b"")
def test_any_bytes_are_valid_or_name_a_field(data: bytes) -> None:
    check_bytes(data)


def test_no_two_tenants_share_a_salt() -> None:
    pairs = [("a", "b/c"), ("a/b", "c"), ("a", "/bc"), ("ab", "c"), ("", "abc"), ("abc", "")]
    pairs += [("a\x00", "b"), ("a", "\x00b"), ("é", ""), ("", "é")]
    assert len({cache_salt(tenant, salt) for tenant, salt in pairs}) == len(pairs)
    assert cache_salt("a", "b") == cache_salt("a", "b")
