"""Prompts that take long: bounded in number, in length and in time, and fair to other tenants."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers

from kvmesh.cluster.errors import ContextExceededError, IngressBusyError
from kvmesh.cluster.ingress.model_checks import check_tokens
from kvmesh.cluster.ingress.prompts import LONG_TEXT_CHARS, Prompts
from kvmesh.cluster.ingress.validate import Limits, generation_spec
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.protos import pb
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import Conversation, PromptPiece
from kvmesh.workers.model.tokenizer import Tokenizer
from tests.cluster.machine import LetterCodec, Machine, machine
from tests.workers.memory_executor import VOCAB

LONG = "a" * LONG_TEXT_CHARS
LIMITS = Limits()


def chat(text: str, template: str = "") -> Conversation:
    return Conversation([{"role": "user", "content": text}], template=template)


class GatedCodec(LetterCodec):
    """Long texts wait in their thread until the gate is open. threads: of each call"""

    chat_template_names = ("default",)
    max_token_chars = 1000

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.running = threading.Semaphore(0)
        self.threads: list[int] = []

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        self.threads.append(threading.get_ident())
        if len(text) >= LONG_TEXT_CHARS:
            self.running.release()
            assert self.gate.wait(60)
        return super().encode(text[:10])

    def render_chat(self, chat: Conversation) -> list[PromptPiece]:
        return [PromptPiece(chat.messages[0]["content"] * 1000, literal=False)]


@pytest.fixture
async def status() -> ClusterStatus:
    async with machine() as built:
        return await status_of(built)


async def status_of(built: Machine) -> ClusterStatus:
    await built.ingress.refresh()
    return built.ingress._served.status


async def started(codec: GatedCodec) -> None:
    """Until one more long text is in its thread."""
    await asyncio.to_thread(codec.running.acquire)


async def test_long_texts_leave_the_event_loops_thread(status: ClusterStatus) -> None:
    codec = GatedCodec()
    codec.gate.set()
    prompts = Prompts(codec, LIMITS)
    await prompts.encode("short", "t", status)
    await prompts.encode(LONG, "t", status)
    here = threading.get_ident()
    assert [thread == here for thread in codec.threads] == [True, False]


class BytesCodec(LetterCodec):
    """The real tokenizer, with a vocabulary of single bytes."""

    max_token_chars = 1 << 20

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {character: index for index, character in enumerate(alphabet)}
        raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel()
        self._tokenizer = Tokenizer(raw, {}, {})

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array(self._tokenizer.encode(text), np.int32)


async def test_the_event_loop_turns_while_a_long_text_is_tokenised(status: ClusterStatus) -> None:
    """The tokenizer does not keep the interpreter's lock."""
    turns = 0

    async def spin() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    spinning = asyncio.ensure_future(spin())
    ids = await Prompts(BytesCodec(), LIMITS).encode("some words " * 50_000, "t", status)
    spinning.cancel()
    assert len(ids) > 500_000
    assert turns > 10, "the lock was kept"


async def test_one_tenants_long_texts_leave_a_thread_to_others(status: ClusterStatus) -> None:
    codec = GatedCodec()
    prompts = Prompts(codec, LIMITS)
    own = [asyncio.ensure_future(prompts.encode(LONG, "a", status)) for _ in range(3)]
    await started(codec)
    other = asyncio.ensure_future(prompts.encode(LONG, "b", status))
    await started(codec)
    assert len(codec.threads) == 2, "one of each tenant runs"
    codec.gate.set()
    await asyncio.gather(*own, other)


async def test_too_many_long_texts_are_refused_and_nothing_is_lost(status: ClusterStatus) -> None:
    codec = GatedCodec()
    prompts = Prompts(codec, LIMITS)
    tasks = [
        asyncio.ensure_future(prompts.encode(LONG, "t", status))
        for _ in range(LIMITS.max_waiting_prompts + 1)
    ]
    await started(codec)
    with pytest.raises(IngressBusyError):
        await prompts.encode(LONG, "t", status)
    assert len(await prompts.encode("short", "t", status)) == 5
    # Callers that leave free their places, but the one that runs keeps the tenant's turn.
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    last = asyncio.ensure_future(prompts.encode(LONG, "t", status))
    await asyncio.sleep(0)
    assert len(codec.threads) == 2, "the long and the short one"
    codec.gate.set()
    assert len(await last) == 10


class ChatCodec(GatedCodec):
    """Chats wait in their thread until the gate is open. chats: what they say, in order"""

    def __init__(self) -> None:
        super().__init__()
        self.chats: list[str] = []

    def render_chat(self, chat: Conversation) -> list[PromptPiece]:
        self.chats.append(chat.messages[0]["content"])
        self.running.release()
        assert self.gate.wait(60)
        return [PromptPiece("A", literal=False)]


@pytest.mark.parametrize("template", ["", "given"])
async def test_tenants_have_the_thread_of_chats_in_turn(
    status: ClusterStatus, template: str
) -> None:
    codec = ChatCodec()
    prompts = Prompts(codec, LIMITS)

    def ask(text: str, tenant: str) -> asyncio.Future[Any]:
        return asyncio.ensure_future(prompts.encode(chat(text, template), tenant, status))

    own = [ask(f"a{n}", "a") for n in range(3)]
    await started(codec)
    other = ask("b", "b")
    await asyncio.sleep(0)  # it has asked for the thread
    codec.gate.set()
    await asyncio.gather(*own, other)
    assert codec.chats == ["a0", "b", "a1", "a2"]


async def test_too_many_chats_of_one_tenant_are_refused(status: ClusterStatus) -> None:
    codec = ChatCodec()
    prompts = Prompts(codec, Limits(max_waiting_chats=2))
    own = [asyncio.ensure_future(prompts.encode(chat("a"), "a", status)) for _ in range(3)]
    await started(codec)
    with pytest.raises(IngressBusyError, match="2 chats wait for a thread already"):
        await prompts.encode(chat("a"), "a", status)
    other = asyncio.ensure_future(prompts.encode(chat("b"), "b", status))
    codec.gate.set()
    await asyncio.gather(*own, other)
    await prompts.encode(chat("a"), "a", status)


async def test_what_no_context_holds_is_refused_as_it_arrives(status: ClusterStatus) -> None:
    codec = GatedCodec()
    longest = max(report.info.max_model_len for report in status.reports.values())
    text = "a" * (longest * codec.max_token_chars + 1)
    turn = pb.ChatMessage(role="user", content=text)
    prompts = Prompts(codec, LIMITS)
    for prompt in (
        pb.Prompt(text=text),
        pb.Prompt(chat=pb.Chat(messages=[turn])),
        pb.Prompt(token_ids=pb.TokenIds(ids=[1] * (longest + 1))),
    ):
        with pytest.raises(ContextExceededError) as caught:
            prompts.check_length(prompt, status)
        assert str(longest) in str(caught.value)
        prompts.check_length(prompt, replace(status, missing=frozenset({"g9"})))
    prompts.check_length(pb.Prompt(text=text[1:]), status)


async def test_a_template_may_not_make_a_prompt_that_no_context_holds(
    status: ClusterStatus,
) -> None:
    codec = GatedCodec()
    text = "a" * codec.max_token_chars
    with pytest.raises(ContextExceededError):
        await Prompts(codec, LIMITS).encode(chat(text), "t", status)


@pytest.mark.parametrize("count", [3, LONG_TEXT_CHARS])
async def test_ids_are_detokenised_or_named(status: ClusterStatus, count: int) -> None:
    prompts = Prompts(LetterCodec(), LIMITS)
    request = pb.DetokenizeRequest(token_ids=[0, 2, 3] * (count // 3))
    reply = await prompts.decode(request, "t", status)
    assert reply.text == "ACD" * (count // 3)
    assert list(reply.token_bytes[:3]) == [b"A", b"C", b"D"]
    request.token_ids[1] = VOCAB
    with pytest.raises(InvalidFieldError, match=f"{VOCAB} is not a valid token id") as caught:
        await prompts.decode(request, "t", status)
    assert caught.value.field == "token_ids[1]"


async def test_ids_without_a_token_are_refused_everywhere(status: ClusterStatus) -> None:
    codec = LetterCodec()
    codec.unused_token_ids = frozenset({7})
    prompts = Prompts(codec, LIMITS)
    with pytest.raises(InvalidFieldError) as caught:
        await prompts.decode(pb.DetokenizeRequest(token_ids=[1, 7]), "t", status)
    assert caught.value.field == "token_ids[1]"
    ids = pb.TokenIds(ids=[1, 2, 7])
    with pytest.raises(InvalidFieldError) as caught:
        await prompts.of(pb.Prompt(token_ids=ids), "t", status)
    assert caught.value.field == "prompt.token_ids.ids[2]"
    for field, params in (
        ("stop_token_ids", pb.SamplingParams(stop_token_ids=[7])),
        ("logit_bias", pb.SamplingParams(logit_bias={7: 1.0})),
    ):
        request = pb.GenerateRequest(prompt=pb.Prompt(text="A"), sampling_params=params)
        spec = generation_spec(request, Limits())
        with pytest.raises(InvalidFieldError) as caught:
            check_tokens(spec, codec.encode("A"), VOCAB, codec.unused_token_ids)
        assert caught.value.field == f"sampling_params.{field}"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2, 7])), "prompt.token_ids.ids[2]"),
        (pb.Prompt(text="AH"), "prompt.text"),
    ],
)
async def test_what_stands_for_an_image_is_refused_in_prompts(
    status: ClusterStatus, prompt: pb.Prompt, field: str
) -> None:
    codec = LetterCodec()
    spec = generation_spec(pb.GenerateRequest(prompt=prompt), Limits())
    ids = await Prompts(codec, LIMITS).encode(spec.prompt, "t", status)
    check_tokens(spec, ids, VOCAB)
    with pytest.raises(InvalidFieldError, match=r"token 7, .*\(image_token_index") as caught:
        check_tokens(spec, ids, VOCAB, placeholders={7: "image_token_index"})
    assert caught.value.field == field
