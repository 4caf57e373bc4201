"""The engine as an object of a program: `kvmesh.LLM`.

    from kvmesh import LLM, SamplingParams

    with LLM(kv_format="k4v4") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=32)
        for completion in llm.generate(["The capital of France is", "Water boils at"], params):
            print(completion.text)

Options, results and errors are those of the SDK.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Final, Literal, NoReturn, Self, TypeAlias, TypeVar, overload

from kvmesh.client import AsyncClient, Client
from kvmesh.client.errors import InvalidRequestError, KVMeshError, UsageError
from kvmesh.client.options import NO_RETRY, GenerateOptions, Messages, Prompt
from kvmesh.client.requests import generate_request
from kvmesh.client.sync_stream import Stream
from kvmesh.client.types import Completion
from kvmesh.cluster.offline.arguments import (
    is_conversation,
    is_one,
    merged,
    offline_config,
    pairs,
    several,
)
from kvmesh.cluster.offline.batch import BatchError, in_order
from kvmesh.cluster.offline.local_cluster import LocalCluster
from kvmesh.cluster.offline.loop_thread import LoopThread
from kvmesh.cluster.offline.score import Score, score
from kvmesh.cluster.offline.transport import AsyncLocalTransport, LocalTransport
from kvmesh.protos import pb

T = TypeVar("T")

OneOrEach: TypeAlias = GenerateOptions | Iterable[GenerateOptions] | None
# Results that `iterate` may hold for one of those that run: so many that a long output delays
# none, and so few that they fit.
AHEAD: Final = 16


class LLM:
    """A model, its engine, and all around it, in this process. Close it, or use it in a `with`.

        llm = LLM("Qwen/Qwen3-4B", kv_format="k4v4", max_num_seqs=64)

    model: a Hugging Face directory, a GGUF file, a hub name, or the embedded model's name; the
        default is that of `config`, or the embedded model
    kv_format: how the KV cache is stored, see `kvmesh formats`; the default is that of `serve`
    quant_policy: the same, as LMDeploy has it: 0 (exact), 4, 8, or 42
    tp: shares of the heads; kvp, one of `settings`: ranks among which a sequence's pages are dealt.
        One rank runs in this process, several in child processes
    config: other settings: a file of `kvmesh serve --config`, or its values. What concerns ports,
        keys, Ray and several groups is not used
    settings: any of `engine`, by name, e.g. max_num_seqs=64 or kv_memory_bytes="4GiB"; they
        override `config`
    Raises ConfigError for a setting or a model that cannot be used.

    Safe to use from several threads, and in notebooks: an event loop and the engine have threads
    of their own. All calls are computed together, as many as fit. A process that is forked cannot
    use its parent's.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        kv_format: str | int | None = None,
        quant_policy: int | None = None,
        tp: int | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        found = offline_config(config, model, kv_format, quant_policy, {"tp": tp, **settings})
        self._process = os.getpid()
        self._loop = LoopThread()
        self._cluster = LocalCluster(found)
        # For one that is dropped and not closed.
        self._finalizer = weakref.finalize(self, self._loop.stop, self._cluster.stop)
        self._finalizer.atexit = False
        _open.add(self)
        try:
            self._loop.run(self._cluster.start())
        except BaseException:
            _open.discard(self)
            self._finalizer()  # without waiting for what still loads
            raise
        self._at_once = 2 * self._cluster.info.max_num_seqs
        transport = AsyncLocalTransport(self._cluster)
        self._calls = AsyncClient(api_key="", retry=NO_RETRY, transport=transport)

    # Generating

    @overload
    def generate(
        self,
        prompts: str | Sequence[int],
        sampling_params: GenerateOptions | None = None,
        **options: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling_params: OneOrEach = None,
        *,
        on_error: Literal["raise"] = "raise",
        **options: Any,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling_params: OneOrEach = None,
        *,
        on_error: Literal["return"],
        **options: Any,
    ) -> list[Completion | KVMeshError]: ...

    def generate(
        self,
        prompts: Any,
        sampling_params: OneOrEach = None,
        *,
        on_error: str = "raise",
        **options: Any,
    ) -> Any:
        """Continue a prompt, or any number of prompts together.

        prompts: a text or token ids, which give one Completion; or several, in any iterable, which
            give a list in their order
        sampling_params: for all prompts, or one for each
        options: the same by name, e.g. temperature=0.0; they override `sampling_params`
        on_error: a prompt that fails, such as one that is too long, keeps no other from being
            computed. "raise": a BatchError in the end, whose `results` has all; "return": the
            error, in its place
        """
        if is_one(prompts):
            return self._run(self._complete(prompts, merged(sampling_params, options)))
        return self._all(self._completions(prompts, sampling_params, options), on_error)

    @overload
    def chat(
        self,
        messages: Messages,
        sampling_params: GenerateOptions | None = None,
        **options: Any,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Iterable[Messages],
        sampling_params: OneOrEach = None,
        *,
        on_error: Literal["raise"] = "raise",
        **options: Any,
    ) -> list[Completion]: ...

    @overload
    def chat(
        self,
        messages: Iterable[Messages],
        sampling_params: OneOrEach = None,
        *,
        on_error: Literal["return"],
        **options: Any,
    ) -> list[Completion | KVMeshError]: ...

    def chat(
        self,
        messages: Any,
        sampling_params: OneOrEach = None,
        *,
        on_error: str = "raise",
        **options: Any,
    ) -> Any:
        """Answer a conversation, or any number of them together; otherwise like `generate`.

        messages: a list of messages, which gives one Completion; or several such lists
        options: also those of chats, such as tools and chat_template_kwargs
        """
        if is_one(messages):
            return self._run(self._answer(messages, merged(sampling_params, options)))
        found = self._completions(messages, sampling_params, options, chats=True)
        return self._all(found, on_error)

    @overload
    def iterate(
        self,
        prompts: Iterable[Prompt],
        sampling_params: OneOrEach = None,
        *,
        on_error: Literal["raise"] = "raise",
        **options: Any,
    ) -> Iterator[Completion]: ...

    @overload
    def iterate(
        self,
        prompts: Iterable[Prompt],
        sampling_params: OneOrEach = None,
        *,
        on_error: Literal["return"],
        **options: Any,
    ) -> Iterator[Completion | KVMeshError]: ...

    def iterate(
        self,
        prompts: Iterable[Prompt],
        sampling_params: OneOrEach = None,
        *,
        on_error: str = "raise",
        **options: Any,
    ) -> Iterator[Any]:
        """Like `generate`, for any number of prompts: gives each Completion once done, in order.

        prompts: texts, token ids or conversations, taken in this thread as others are done
        on_error: "raise": the error, in its place, which ends all that runs, as leaving the
            iteration does
        """
        _check_on_error(on_error)
        found = self._completions(prompts, sampling_params, options)
        return self._in_order(found, on_error, ahead=AHEAD * self._at_once)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: GenerateOptions | None = None,
        **options: Any,
    ) -> Stream:
        """Continue a prompt, or answer a conversation: an iterator of `Delta`, as it is generated.

        Leaving it ends the generation. Its `events()` say how a long prompt proceeds, and its
        `completion` is the whole.
        """
        client = self.client
        call: Any = client.chat_stream if is_conversation(prompt) else client.generate_stream
        stream: Stream = call(prompt, **merged(sampling_params, options))
        return stream

    @overload
    def score(  # type: ignore[overload-overlap]
        self, prompts: str, continuations: str | None = None
    ) -> Score: ...

    @overload
    def score(
        self, prompts: Sequence[int], continuations: Sequence[int] | None = None
    ) -> Score: ...

    @overload
    def score(
        self,
        prompts: Iterable[str | Sequence[int]],
        continuations: Iterable[str | Sequence[int]] | None = None,
        *,
        on_error: Literal["raise"] = "raise",
    ) -> list[Score]: ...

    @overload
    def score(
        self,
        prompts: Iterable[str | Sequence[int]],
        continuations: Iterable[str | Sequence[int]] | None = None,
        *,
        on_error: Literal["return"],
    ) -> list[Score | KVMeshError]: ...

    def score(self, prompts: Any, continuations: Any = None, *, on_error: str = "raise") -> Any:
        """Log-likelihoods, of prompts or of what follows them, under the model and its KV format.

        prompts: a text or token ids, which give one Score; or several, which give a list
        continuations: one for each prompt, and of its kind; then only their tokens are scored. A
            token that is part of both texts counts as the continuation's
        """
        if is_one(prompts):
            return self._run(score(self._calls, prompts, continuations))
        asked: Iterable[tuple[Any, Any]] = ((each, None) for each in several("prompts", prompts))
        if continuations is not None:
            asked = pairs("continuations", prompts, several("continuations", continuations))
        return self._all((score(self._calls, *pair) for pair in asked), on_error)

    # Else

    @property
    def client(self) -> Client:
        """A client of the SDK for all else: tokenize, estimate, explain, model_info, loads."""
        self._check_process()
        transport = LocalTransport(self._cluster, self._loop, self)
        return Client(api_key="", retry=NO_RETRY, transport=transport)

    def close(self) -> None:
        """End what runs, with ClosedError, and free the memory. Idempotent."""
        if os.getpid() == self._process:
            _open.discard(self)
            self._finalizer()
            self._loop.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM holds an engine and cannot be pickled; make one in each process")

    # Within

    def _completions(
        self, prompts: Any, params: OneOrEach, options: Mapping[str, Any], chats: bool = False
    ) -> Iterator[Coroutine[Any, Any, Completion]]:
        """The calls of all prompts, each made when it is taken."""
        prompts = several("prompts", prompts)
        asked: Iterable[tuple[Any, dict[str, Any]]]
        if params is None or isinstance(params, Mapping):
            same = merged(params, options)
            generate_request(pb.Prompt(chat=pb.Chat()), same)  # what is no option fails at once
            asked = ((prompt, same) for prompt in prompts)
        else:
            each = pairs("sampling_params", prompts, several("sampling_params", params))
            asked = ((prompt, merged(own, options)) for prompt, own in each)
        call = self._answer if chats else self._complete
        return (call(prompt, own) for prompt, own in asked)

    async def _complete(self, prompt: Any, options: Mapping[str, Any]) -> Completion:
        if is_conversation(prompt):
            return await self._answer(prompt, options)
        return await self._calls.generate(prompt, **options)

    async def _answer(self, messages: Any, options: Mapping[str, Any]) -> Completion:
        return await self._calls.chat(messages, **options)

    def _all(self, work: Iterable[Coroutine[Any, Any, Any]], on_error: str) -> list[Any]:
        _check_on_error(on_error)
        results = list(self._in_order(work, "return"))
        if on_error == "raise" and any(isinstance(found, KVMeshError) for found in results):
            raise BatchError.of(results)
        return results

    def _in_order(
        self, work: Iterable[Coroutine[Any, Any, Any]], on_error: str, ahead: int | None = None
    ) -> Iterator[Any]:
        return in_order(
            work,
            self._submit,
            self._loop.wait,
            at_once=self._at_once,
            ahead=ahead,
            keep_errors=on_error == "return",
        )

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        try:
            self._check_process()
            return self._loop.submit(work)
        except KVMeshError:
            work.close()
            raise

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.wait(self._submit(work))

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                f"this LLM was made before process {os.getpid()} was forked; make another one in it"
            )


_open: weakref.WeakSet[LLM] = weakref.WeakSet()


def _close_all() -> None:
    """At the end of the program: an engine that still computes then would crash it."""
    for llm in list(_open):
        llm.close()


# Not with atexit, whose turn comes when pools of threads, which the engine needs to end a step, are
# closed already: they use this, and those that register later are called earlier.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]


def _check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "return"):
        raise InvalidRequestError.of("on_error", f"must be 'raise' or 'return'; got {on_error!r}")
