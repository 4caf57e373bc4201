"""One group over gRPC and HTTP: output, refusals, cancellation, capacity, metrics, command line."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import os
import random
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import openai
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_status import rpc_status
from pydantic import BaseModel

from kvmesh.client import (
    NO_RETRY,
    AsyncClient,
    AuthenticationError,
    Client,
    DeadlineExceededError,
    FinishReason,
    InvalidRequestError,
    KVMeshError,
    Message,
    ModelNotFoundError,
    NeverFitsError,
    OverCapacityError,
)
from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.cluster.lifecycle import Endpoint
from kvmesh.cluster.telemetry.table import METRICS, RAY_LABELS
from kvmesh.protos import pb, pb_grpc
from tests.cluster.e2e.harness import (
    PATIENCE_S,
    POOL_SEQUENCES,
    call_raw,
    check_accounts,
    greedy_by_engine,
    in_use,
    processes_named,
    stream_raw,
    text_request,
    used_pages,
    wait_for,
    wait_idle,
)
from tests.cluster.e2e.one_group.config import QUEUE_LIMIT, config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

LONG = 500  # tokens of an output that nobody waits for
CONFIG = config()


PROMPTS = ("The capital of France is", "def fibonacci(n):", "Water boils at")


def test_output_equals_that_of_the_engine(client: Client) -> None:
    ids = [client.tokenize(prompt).token_ids for prompt in PROMPTS]
    expected = greedy_by_engine(CONFIG, ids, max_tokens=20)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        for _ in range(2):
            completion = client.generate(prompt, max_tokens=20, temperature=0.0, ignore_eos=True)
            assert completion.choices[0].token_ids == tokens
            assert completion.usage.completion_tokens == len(tokens)
    wait_idle(client)


def test_a_stream_equals_a_unary_reply(client: Client) -> None:
    whole = client.generate(PROMPTS[0], max_tokens=12, temperature=0.0)
    with client.generate_stream(PROMPTS[0], max_tokens=12, temperature=0.0) as stream:
        deltas = list(stream)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert stream.completion.choices == whole.choices
    usage = stream.usage
    assert usage is not None
    assert usage.kv_used_bytes == usage.kv_freed_bytes > 0


async def test_openais_clients_get_the_same_output(endpoint: Endpoint, client: Client) -> None:
    """One blocking, one asynchronous, whole and streamed, in every one of its APIs."""
    greedy: Any = {"model": "smollm2-135m-instruct", "temperature": 0.0}
    expected = client.generate(PROMPTS[0], max_tokens=12, temperature=0.0).text
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    said = client.chat([Message("user", messages[0]["content"])], max_tokens=12, temperature=0.0)
    url = f"{endpoint.http_url}/v1"
    with openai.OpenAI(base_url=url, api_key=endpoint.api_key, max_retries=0) as blocking:
        (model,) = blocking.models.list().data
        assert model.id == greedy["model"]
        ids = list(client.tokenize(PROMPTS[0]).token_ids)
        for prompt in (PROMPTS[0], ids, [PROMPTS[0]], [ids, ids]):
            for choice in blocking.completions.create(
                prompt=prompt, max_tokens=12, **greedy
            ).choices:
                assert choice.text == expected
        chunks = blocking.completions.create(
            prompt=PROMPTS[0], max_tokens=12, stream=True, logprobs=2, **greedy
        )
        choices = [chunk.choices[0] for chunk in chunks]
        assert "".join(choice.text for choice in choices) == expected
        tokens = [token for x in choices if x.logprobs for token in x.logprobs.tokens or []]
        assert "".join(tokens) == expected
    async with openai.AsyncOpenAI(base_url=url, api_key=endpoint.api_key) as unblocking:
        whole = await unblocking.chat.completions.create(messages=messages, max_tokens=12, **greedy)
        assert whole.choices[0].message.content == said.text
        stream = await unblocking.chat.completions.create(
            messages=messages, max_completion_tokens=12, stream=True, **greedy
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(parts) == said.text
        response = await unblocking.responses.create(
            input=messages[0]["content"], max_output_tokens=12, **greedy
        )
        assert response.output_text == said.text
    wait_idle(client)


class City(BaseModel):
    name: str
    inhabitants: int


def test_openais_client_parses_answers(endpoint: Endpoint) -> None:
    url = f"{endpoint.http_url}/v1"
    messages: Any = [{"role": "user", "content": "Which city is the capital of France?"}]
    with openai.OpenAI(base_url=url, api_key=endpoint.api_key, max_retries=0) as client:
        chat = client.chat.completions.parse(
            model="", messages=messages, response_format=City, max_tokens=200, temperature=0.0
        )
        assert isinstance(chat.choices[0].message.parsed, City)
        response = client.responses.parse(
            model="", input=messages, text_format=City, max_output_tokens=200, temperature=0.0
        )
        assert isinstance(response.output_parsed, City)
        scored = client.completions.create(
            model="", prompt=PROMPTS[0], max_tokens=0, echo=True, logprobs=1
        ).choices[0]
        assert scored.text == PROMPTS[0] and scored.logprobs is not None
        scores: list[Any] = scored.logprobs.token_logprobs or []
        assert scores[0] is None and scores[1:] and max(scores[1:]) <= 0


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_over_http_frees_pages(endpoint: Endpoint, client: Client, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": stream}
    headers = {"authorization": f"Bearer {endpoint.api_key}", "content-type": "application/json"}
    wait_idle(client)
    before = generated(client)
    call = http.client.HTTPConnection(endpoint.http_url.removeprefix("http://"))
    call.request("POST", "/v1/completions", json.dumps(body), headers)
    wait_for(lambda: used_pages(client.loads()) > 0, "it runs")
    if stream:
        assert call.getresponse().status == 200
    with ranks_paused(client):
        call.close()
    wait_idle(client)
    assert generated(client) - before < LONG, "the output was cut short"


def test_refusals_over_http(endpoint: Endpoint) -> None:
    url = f"{endpoint.http_url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as unknown,
        pytest.raises(openai.AuthenticationError),
    ):
        unknown.models.list()
    with openai.OpenAI(base_url=url, api_key=endpoint.api_key, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="", prompt=[5] * 5000, max_tokens=5)
        assert caught.value.code == "context_length_exceeded"
    assert urllib.request.urlopen(f"{endpoint.http_url}/health").status == 200
    assert urllib.request.urlopen(f"{endpoint.http_url}/-/healthz").status == 200
    with pytest.raises(urllib.error.HTTPError, match="413"):
        request = urllib.request.Request(
            f"{url}/completions",
            b" " * (CONFIG.ingress.max_request_bytes + 1),
            {"authorization": f"Bearer {endpoint.api_key}"},
        )
        urllib.request.urlopen(request)


@pytest.mark.parametrize("still_running", [False, True])
def test_another_client_continues_a_stream(
    endpoint: Endpoint, client: Client, still_running: bool
) -> None:
    """The output is that of a stream that nobody interrupted; the cursor of its end has it all."""
    options: Any = {"max_tokens": 24, "seed": 11, "n": 2}
    whole = client.generate(PROMPTS[0], **options)
    stream = client.generate_stream(PROMPTS[0], **options)
    for _ in range(3):
        next(stream)
    cursor = stream.cursor
    if not still_running:
        stream.close()
    with Client(endpoint.target, api_key=endpoint.api_key) as other:
        resumed = other.resume(cursor)
        assert list(resumed), "something was left"
        assert resumed.completion.choices == whole.choices
        ended = other.resume(resumed.cursor)
        assert list(ended) == []
        assert ended.completion.choices == whole.choices
    stream.close()


def test_the_prompt_can_be_scored_without_output(client: Client) -> None:
    prompt = PROMPTS[0] + " Paris"
    scored = client.generate(prompt, prompt_logprobs=1, max_tokens=0)
    ids = client.tokenize(prompt).token_ids
    assert [entry.chosen.token_id for entry in scored.prompt_logprobs] == list(ids[1:])
    last = scored.prompt_logprobs[-1]
    assert last.chosen.text == " Paris"
    # What the model continues the shorter prompt with, and as probable.
    whole = client.generate(PROMPTS[0], max_tokens=1, temperature=0.0, logprobs=0)
    (entry,) = whole.choices[0].logprobs
    assert last.top[0].token_id == entry.chosen.token_id
    assert last.top[0].logprob == pytest.approx(entry.chosen.logprob, abs=1e-3)
    text = b"".join(bytes(entry.chosen.bytes) for entry in scored.prompt_logprobs)
    assert client.detokenize(ids[:1]) + text.decode() == prompt
    assert scored.choices[0].text == ""
    wait_idle(client)


def test_text_shows_special_tokens_and_stops_at_them(client: Client) -> None:
    question = [Message("user", "Say hello.")]
    options: Any = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True}
    shown = client.chat(question, **options, skip_special_tokens=False).text
    name = "<|im_end|>"
    assert name in shown
    stopped = client.chat(question, **options, stop=[name])
    assert stopped.choices[0].matched_stop == name
    assert stopped.text == shown[: shown.index(name)]
    kept = client.chat(question, **options, stop=[name], include_stop_str_in_output=True)
    assert kept.text == stopped.text + name


@pytest.mark.parametrize(
    ("source", "reason"),
    [("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ 'a' * 10 ** 10 }}", "memory"), ("{% x %}", "x")],
)
def test_a_template_that_fails_is_the_requests_fault(
    client: Client, source: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        client.chat([Message("user", "hi")], chat_template=source)
    assert "the given chat template" in caught.value.message
    echo = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    chat = client.chat([Message("user", PROMPTS[0])], chat_template=echo, max_tokens=4, seed=1)
    assert chat.text == client.generate(PROMPTS[0], max_tokens=4, seed=1).text


def test_the_model_says_how_it_samples(endpoint: Endpoint, client: Client) -> None:
    defaults = client.model_info().default_sampling_params
    assert (defaults.temperature, defaults.top_p, defaults.max_tokens) == (0.2, 0.9, 256)
    assert "temperature 0.2, top_p 0.9" in kvmesh(endpoint, "status").stdout
    assert client.model_info().chat_template_names == ("default",)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_output_matches_its_schema_while_others_are_free(client: Client) -> None:
    free = client.generate("The sea at night", max_tokens=20, temperature=0.0)
    options: Any = {"max_tokens": 150, "temperature": 1.5, "n": 3, "seed": 5}
    with client.generate_stream("The sea at night", max_tokens=20, temperature=0.0) as neighbour:
        done = client.generate("A person:", structured_output={"json_schema": PERSON}, **options)
        assert "".join(delta.text for delta in neighbour) == free.text
    ended = [choice for choice in done.choices if choice.finish_reason is FinishReason.STOP]
    assert ended
    for choice in ended:
        jsonschema.validate(json.loads(choice.text), PERSON)


def test_a_choice_between_texts_is_the_models(client: Client) -> None:
    cities = [" London", " Paris", " Rome"]
    done = client.generate(
        "The capital of France is", structured_output={"choice": cities}, temperature=0.0
    )
    assert done.text == " Paris"


def test_several_choices_of_one_seed_are_repeatable(client: Client) -> None:
    first, second = (
        client.generate(PROMPTS[0], max_tokens=6, temperature=1.0, n=2, seed=7) for _ in range(2)
    )
    assert first.choices == second.choices
    assert [choice.index for choice in first.choices] == [0, 1]


# Bad input


def with_ids(*ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=ids)),
        sampling_params=pb.SamplingParams(max_tokens=2),
    )


BAD_FIELDS: Mapping[str, tuple[pb.GenerateRequest, str]] = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty text": (text_request(""), "prompt.text"),
    "no token ids": (with_ids(), "prompt.token_ids"),
    "unknown token id": (with_ids(1, 2, 49_152), "prompt.token_ids.ids[2]"),
    "huge token id": (with_ids(1, 2**32 - 1), "prompt.token_ids"),
    "NaN temperature": (text_request(temperature=math.nan), "sampling_params.temperature"),
    "negative temperature": (text_request(temperature=-1.0), "sampling_params.temperature"),
    "NaN top_p": (text_request(top_p=math.nan), "sampling_params.top_p"),
    "negative top_p": (text_request(top_p=-0.5), "sampling_params.top_p"),
    "negative top_k": (text_request(top_k=-2), "sampling_params.top_k"),
    "NaN min_p": (text_request(min_p=math.nan), "sampling_params.min_p"),
    "NaN penalty": (
        text_request(presence_penalty=math.nan),
        "sampling_params.presence_penalty",
    ),
    "negative repetition penalty": (
        text_request(repetition_penalty=-1.0),
        "sampling_params.repetition_penalty",
    ),
    "negative max_tokens": (text_request(max_tokens=-1), "sampling_params.max_tokens"),
    "NaN bias": (text_request(logit_bias={5: math.nan}), "sampling_params.logit_bias"),
    "beyond the context": (text_request(max_tokens=8192), "sampling_params.max_tokens"),
    "10,000 stop strings": (
        text_request(stop=[str(number) for number in range(10_000)]),
        "sampling_params.stop",
    ),
    "unknown stop token": (text_request(stop_token_ids=[49_152]), "sampling_params.stop_token_ids"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_input_is_refused_by_its_field(endpoint: Endpoint, client: Client, name: str) -> None:
    request, field = BAD_FIELDS[name]
    body = request.SerializeToString()
    for error in (
        call_raw(endpoint.target, "Generate", body, endpoint.api_key),
        stream_raw(endpoint.target, body, endpoint.api_key),
    ):
        assert isinstance(error, InvalidRequestError)
        assert error.code == "INVALID_ARGUMENT"
        assert error.field is not None and error.field.startswith(field)
    assert client.generate("And yet", max_tokens=1).usage.completion_tokens == 1


def broken_text(method: str) -> bytes:
    request = text_request("AAAA")
    if method == "Tokenize":
        whole = pb.TokenizeRequest(prompt=request.prompt).SerializeToString()
    else:
        whole = request.SerializeToString()
    assert whole.count(b"AAAA") == 1
    return whole.replace(b"AAAA", b"\xff\xfe\xc0\x80")


@pytest.mark.parametrize("kind", ["invalid UTF-8", "not protobuf", "a length beyond the end"])
@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Tokenize"])
def test_invalid_protobuf_is_refused(
    endpoint: Endpoint, client: Client, method: str, kind: str
) -> None:
    body = {
        "invalid UTF-8": broken_text(method),
        "not protobuf": b"\xff" * 64,
        "a length beyond the end": b"\x1a\xff\xff\xff\xff\x0f",
    }[kind]
    if method == "GenerateStream":
        error = stream_raw(endpoint.target, body, endpoint.api_key)
    else:
        error = call_raw(endpoint.target, method, body, endpoint.api_key)
    assert isinstance(error, InvalidRequestError)
    assert error.field == "request"
    assert client.generate("And yet", max_tokens=1).usage.completion_tokens == 1


def test_a_prompt_that_no_group_can_hold_is_refused_with_its_bytes(client: Client) -> None:
    with pytest.raises(NeverFitsError) as caught:
        client.generate([5] * 4000, max_tokens=8)
    assert caught.value.code == "FAILED_PRECONDITION"
    needed, available = caught.value.needed_bytes, caught.value.available_bytes
    assert needed is not None and available is not None
    assert needed > available > 0
    assert client.loads().groups[0].total_bytes >= available


def test_a_prompt_beyond_the_context_is_refused_with_its_bytes(client: Client) -> None:
    with pytest.raises(NeverFitsError) as caught:
        client.generate([5] * 9000, max_tokens=1)
    needed, available = caught.value.needed_bytes, caught.value.available_bytes
    assert needed is not None and available is not None
    assert needed > available > 0


@pytest.mark.parametrize("key", [None, "", "wrong"])
def test_calls_without_a_valid_key_are_refused(
    endpoint: Endpoint, client: Client, key: str | None
) -> None:
    body = text_request().SerializeToString()
    for error in (
        call_raw(endpoint.target, "Generate", body, key),
        stream_raw(endpoint.target, body, key),
        call_raw(endpoint.target, "GetTenantLoads", b"", key),
    ):
        assert isinstance(error, AuthenticationError)
        assert error.code == "UNAUTHENTICATED"
    assert client.generate("And yet", max_tokens=1).usage.completion_tokens == 1


def test_errors_are_statuses_as_google_defines_them(endpoint: Endpoint) -> None:
    metadata = (("authorization", f"Bearer {endpoint.api_key}"),)
    with grpc.insecure_channel(endpoint.target) as channel:
        stub = pb_grpc.KVMeshStub(channel)
        request = pb.GenerateRequest(sampling_params=pb.SamplingParams(top_p=2))
        for call in (stub.Generate, lambda *a, **k: next(stub.GenerateStream(*a, **k))):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata, timeout=PATIENCE_S)
            failed: Any = caught.value
            # Raises ValueError unless code and message are those of the call.
            status = rpc_status.from_call(failed)
            bad_request, error = BadRequest(), pb.Error()
            assert any(detail.Unpack(bad_request) for detail in status.details)
            assert any(detail.Unpack(error) for detail in status.details)
            assert bad_request.field_violations[0].field == "sampling_params.top_p"
            assert error.reason == pb.ERROR_REASON_INVALID_FIELD


def test_an_unknown_model_is_not_found(client: Client) -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        client.generate("Hello", max_tokens=1, model="no-such-model")


def test_refusals_reveal_no_internals(endpoint: Endpoint) -> None:
    for request, _ in BAD_FIELDS.values():
        error = call_raw(endpoint.target, "Generate", request.SerializeToString(), endpoint.api_key)
        assert error is not None
        shown = f"{error.message} {error.violations}"
        assert "Traceback" not in shown and ".py" not in shown
        assert str(os.getpid()) not in shown and "/tmp" not in shown


# Cancellation


@contextmanager
def ranks_paused(client: Client) -> Iterator[None]:
    """So that no output ends before its client has left and the server has noticed, however slow
    the processes are."""
    ranks = processes_named("ray::RankActor")
    for rank in ranks:
        rank.suspend()
    try:
        yield
        for _ in range(10):  # through the proxy and the ingress, behind the end of the connection
            client.tokenize("x")
    finally:
        for rank in ranks:
            rank.resume()


def generated(client: Client) -> int:
    """Tokens of all outputs so far."""
    return sum(group.completion_tokens_total for group in client.loads().groups)


def test_closing_a_stream_frees_its_pages(client: Client, record_property: Any) -> None:
    wait_idle(client)
    before = generated(client)
    with client.generate_stream("Count:", max_tokens=LONG, ignore_eos=True) as stream:
        for _ in range(4):
            next(stream)  # which, other than leaving a loop, does not close it
        with ranks_paused(client):
            assert used_pages(client.loads()) > 0
            stream.close()
    record_property("freed_after_s", wait_idle(client))
    assert generated(client) - before < LONG, "the output was cut short"


def test_abort_ends_a_stream_from_another_connection(endpoint: Endpoint, client: Client) -> None:
    before = generated(client)
    with client.generate_stream(
        "Count:", max_tokens=LONG, ignore_eos=True, request_id="to-abort"
    ) as stream:
        deltas = iter(stream)
        next(deltas)
        with ranks_paused(client), Client(endpoint.target, api_key=endpoint.api_key) as other:
            assert other.abort("to-abort")
        assert [delta.finish_reason for delta in deltas][-1] is FinishReason.ABORT
    wait_idle(client)
    assert generated(client) - before < LONG, "the output was cut short"
    assert not client.abort("to-abort")


CHILD = """
import os
from kvmesh.client import Client
with Client(os.environ["KVMESH_TARGET"]) as client:
    with client.generate_stream("Count:", max_tokens=500, ignore_eos=True) as stream:
        for delta in stream:
            print("token", flush=True)
"""


def child_environment(endpoint: Endpoint) -> dict[str, str]:
    return {
        **os.environ,
        "KVMESH_TARGET": endpoint.target,
        "KVMESH_API_KEY": endpoint.api_key or "",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "COLUMNS": "200",
    }


def test_a_client_that_is_killed_counts_as_cancelled(
    endpoint: Endpoint, client: Client, record_property: Any
) -> None:
    wait_idle(client)
    before = generated(client)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env=child_environment(endpoint),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "token\n"
        with ranks_paused(client):
            assert used_pages(client.loads()) > 0
            child.kill()
    finally:
        child.kill()
        child.communicate(timeout=PATIENCE_S)
    record_property("freed_after_s", wait_idle(client))
    assert generated(client) - before < LONG, "the output was cut short"


async def one_of_many(client: AsyncClient, rng: random.Random) -> str:
    """A request of random length that is cancelled, or times out, at a random moment."""
    prompt = [rng.randrange(100, 40_000) for _ in range(rng.randint(1, 60))]
    options: dict[str, Any] = {"max_tokens": rng.randint(1, 12), "ignore_eos": True}
    outcome = rng.choice(("whole", "left", "cancelled", "deadline"))
    if outcome == "deadline":
        options["timeout_s"] = rng.uniform(0.02, 2.0)
    leave_after = rng.randint(0, 4) if outcome == "left" else math.inf
    patience_s = rng.uniform(0.0, 2.0) if outcome == "cancelled" else None
    try:
        async with asyncio.timeout(patience_s):
            async with client.generate_stream(prompt, **options) as stream:
                seen = 0
                async for _ in stream:
                    seen += 1
                    if seen > leave_after:
                        return "left"
    except TimeoutError:
        return "deadline" if outcome == "deadline" else "cancelled"
    except OverCapacityError:
        return "refused"
    return "ended"


async def test_200_requests_with_random_ends_leave_nothing(
    endpoint: Endpoint, client: Client, record_property: Any
) -> None:
    rng = random.Random(11)
    before = client.loads().router
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key) as many:
        slots = asyncio.Semaphore(20)

        async def one(number: int) -> str:
            async with slots:
                return await one_of_many(many, random.Random(rng.randrange(1 << 32) + number))

        outcomes = await asyncio.gather(*(one(number) for number in range(200)))
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    record_property("outcomes", counts)
    assert counts.get("ended", 0) > 20
    await asyncio.to_thread(wait_idle, client)
    after = client.loads()
    check_accounts(after)
    assert in_use(after) == dict.fromkeys(in_use(after), 0)
    granted = after.router.granted_total - before.granted_total
    released = after.router.released_total - before.released_total
    assert granted == released
    assert after.router.expired_total == before.expired_total


# Over capacity


async def test_100_at_once_finish_or_are_refused(
    endpoint: Endpoint, client: Client, record_property: Any
) -> None:
    await asyncio.to_thread(wait_idle, client)
    ledger = client.loads().router.ledger
    assert [account.hot_pages_total for account in ledger] == [POOL_SEQUENCES]

    async with AsyncClient(endpoint.target, api_key=endpoint.api_key, retry=NO_RETRY) as many:

        async def one(number: int) -> int:
            completion = await many.generate(
                [300 + number, 301, 302], max_tokens=4, ignore_eos=True
            )
            return len(completion.choices[0].token_ids)

        results = await asyncio.gather(
            *(one(number) for number in range(100)), return_exceptions=True
        )
    finished = [result for result in results if isinstance(result, int)]
    refused = [result for result in results if isinstance(result, KVMeshError)]
    record_property("finished", len(finished))
    assert len(finished) + len(refused) == 100
    assert set(finished) == {4}
    assert len(finished) >= POOL_SEQUENCES + QUEUE_LIMIT
    assert refused, "the queue is shorter than the load"
    for error in refused:
        assert isinstance(error, OverCapacityError)
        assert error.code == "RESOURCE_EXHAUSTED"
        assert error.retry_after_s is not None and error.retry_after_s > 0
    await asyncio.to_thread(wait_idle, client)


async def test_a_queued_request_can_time_out_or_be_cancelled(
    endpoint: Endpoint, client: Client
) -> None:
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key) as many:
        options: dict[str, Any] = {"max_tokens": LONG, "ignore_eos": True}
        streams = [many.generate_stream("Count:", **options) for _ in range(POOL_SEQUENCES + 2)]
        # Keep the iterators: one without a reference is closed, which ends its request.
        iterators = [aiter(stream) for stream in streams]
        readers = [asyncio.ensure_future(anext(iterator)) for iterator in iterators]
        await asyncio.to_thread(
            wait_for, lambda: client.loads().router.queue_length >= 2, "two in the queue"
        )
        with pytest.raises(DeadlineExceededError):  # too long to overtake them
            await many.generate("Count:", max_tokens=LONG, timeout_s=0.5)
        for stream in streams:
            await stream.aclose()
        await asyncio.gather(*readers, return_exceptions=True)
    await asyncio.to_thread(wait_idle, client)


# Metrics and the command line

# Absent unless something is lost, refused or found in a cache, or has a GPU or a probe.
RARE = {
    *("kvmesh_router_refusals_total", "kvmesh_router_refused_bytes_total"),
    "kvmesh_cached_tokens_total",
    *("kvmesh_failovers_total", "kvmesh_quarantined_requests_total", "kvmesh_preemptions_total"),
    *("kvmesh_gpu_utilization_ratio", "kvmesh_gpu_memory_bytes", "kvmesh_group_divergence_nats"),
    "kvmesh_expert_imbalance_ratio",
    "kvmesh_pinned_evictions_total",
}


def scrape(endpoint: Endpoint) -> list[str]:
    assert endpoint.metrics_url is not None
    with urllib.request.urlopen(endpoint.metrics_url, timeout=PATIENCE_S) as reply:
        text: str = reply.read().decode()
    return [line for line in text.splitlines() if line.startswith("ray_kvmesh")]


def total(lines: list[str], name: str, *labels: str) -> float:
    """The sum of a meter's samples that have all of `labels`."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(name + "{") and all(label in line for label in labels)
    )


def test_metrics_and_loads_agree(endpoint: Endpoint, client: Client) -> None:
    client.generate("Say something", max_tokens=4)
    wait_idle(client)
    group = client.loads().groups[0]

    def agree() -> bool:
        lines = scrape(endpoint)
        totals = {
            "prompt": group.prompt_tokens_total,
            "completion": group.completion_tokens_total,
            "cached": group.cached_tokens_total,
        }
        return (
            all(
                total(lines, f"ray_kvmesh_{kind}_tokens_total") == expected
                for kind, expected in totals.items()
            )
            and all(
                total(lines, "ray_kvmesh_sequences_total", f'outcome="{outcome}"') == count
                for outcome, count in group.outcomes_total.items()
            )
            and total(lines, "ray_kvmesh_pool_pages", 'state="used"') == 0
            and total(lines, "ray_kvmesh_pool_pages", 'arena="hot"') == group.hot.total
            and total(lines, "ray_kvmesh_pool_pages", 'arena="sealed"') == group.sealed.total
            and total(lines, "ray_kvmesh_router_leases") == 0
        )

    wait_for(agree, "the Prometheus endpoint agrees with GetLoads", period_s=0.5)
    expected = {name for x in METRICS if x.name not in RARE for name in x.samples}

    def names() -> set[str]:
        return {line.partition("{")[0] for line in scrape(endpoint)}

    # Each process is collected at its own time.
    wait_for(lambda: expected <= names(), lambda: f"{expected - names()}", period_s=0.5)
    assert names() <= {name for metric in METRICS for name in metric.samples}


def test_metrics_have_the_labels_of_the_table(endpoint: Endpoint, client: Client) -> None:
    client.generate("Say something", max_tokens=2)
    for line in scrape(endpoint):
        name, labels = re.match(r"(\w+)\{(.*)\} ", line).groups()  # type: ignore[union-attr]
        metric = next(x for x in METRICS if name in x.samples)
        found = set(re.findall(r'(\w+)="', labels)) - {"le", "WorkerId"}
        assert found - set(RAY_LABELS) == set(metric.label_names), line


def test_logs_name_requests_and_never_hold_what_they_say(
    endpoint: Endpoint, client: Client
) -> None:
    """Of all processes, Ray's own included."""
    secret = "xylophonewords"
    client.generate(secret, max_tokens=4, request_id="a-good-request")
    with pytest.raises(NeverFitsError):
        client.generate(f"{secret} " * 1200, max_tokens=8, request_id="too-large")
    # Below the cluster's directory, as the proxy's socket.
    directory = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parents[1]

    def lines() -> list[dict[str, Any]]:
        logs = directory.glob("ray/session_latest/logs/serve/replica_kvmesh_ingress_*.log")
        return [json.loads(line) for path in logs for line in path.read_text().splitlines()]

    def found() -> bool:
        return any(line.get("request_id") == "too-large" for line in lines())

    wait_for(found, "the refused request is in the log of the ingress")
    (line,) = [line for line in lines() if line.get("request_id") == "too-large"]
    assert line["tenant"] == "local"
    assert endpoint.api_key
    for path in directory.glob("ray/session_latest/logs/**/*"):
        if path.is_file():
            written = path.read_text(errors="replace")
            assert secret not in written and endpoint.api_key not in written, path


def kvmesh(endpoint: Endpoint, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from kvmesh.cluster.cli.commands import app; app()", *arguments],
        env=child_environment(endpoint),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_the_command_line_generates_and_shows_status_and_estimates(
    endpoint: Endpoint, client: Client
) -> None:
    generated = kvmesh(endpoint, "generate", PROMPTS[0], "--max-tokens", "8", "--temperature", "0")
    assert generated.returncode == 0, generated.stderr
    expected = client.generate(PROMPTS[0], max_tokens=8, temperature=0.0).text
    assert generated.stdout.strip() == expected.strip()
    status = kvmesh(endpoint, "status")
    assert status.returncode == 0, status.stderr
    for word in ("engine-0", "int8", "smollm2-135m-instruct", "0 leases"):
        assert word in status.stdout
    estimate = kvmesh(endpoint, "estimate", "--prompt-tokens", "4000")
    assert estimate.returncode == ExitCode.REFUSED, estimate.stderr
    assert "never fits" in estimate.stdout


def test_the_command_line_fails_in_one_line(endpoint: Endpoint) -> None:
    refused = kvmesh(endpoint, "generate", "x", "--temperature", "-1")
    assert refused.returncode == ExitCode.REFUSED
    assert "temperature" in refused.stderr and "Traceback" not in refused.stderr
    keyless = kvmesh(endpoint, "status", "--api-key", "wrong")
    assert keyless.returncode == ExitCode.REFUSED
    assert "key" in keyless.stderr and "Traceback" not in keyless.stderr
