"""What a run of `kvmesh bench serve` needs: a server that is connected, and requests for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from kvmesh.client.credentials import resolve_target
from kvmesh.cluster.bench.lengths import LengthDistribution
from kvmesh.cluster.bench.openai_target import OpenAITarget
from kvmesh.cluster.bench.prompts import PromptMaker
from kvmesh.cluster.bench.sharegpt import CountTokens, sharegpt_requests
from kvmesh.cluster.bench.targets import BenchTarget, GrpcTarget, ReplyFailed
from kvmesh.cluster.bench.workload import (
    BenchRequest,
    arriving,
    random_requests,
    replayed,
    sharegpt_like,
)
from kvmesh.cluster.cli.bench_options import (
    DEFAULT_REQUESTS,
    LoadOptions,
    WorkloadOptions,
    as_option,
)
from kvmesh.cluster.cli.exits import CommandFailed, ExitCode
from kvmesh.cluster.cli.options import ServerOptions
from kvmesh.cluster.simulator.trace import read_trace
from kvmesh.workers.model.source import resolve_tokenizer
from kvmesh.workers.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class BenchServer:
    """A server that is connected, and prompts that it takes."""

    target: BenchTarget
    prompts: PromptMaker
    count_tokens: CountTokens


@contextlib.asynccontextmanager
async def connected(
    connection: ServerOptions, workload: WorkloadOptions, load: LoadOptions
) -> AsyncIterator[BenchServer]:
    """The server that the options name. Raises what makes it unusable, for users."""
    connect = _kvmesh if load.openai is None else _openai
    async with connect(connection, workload, load) as server:
        if workload.tokenizer is not None:
            server = replace(server, count_tokens=_local_counter(workload.tokenizer))
        yield server


@contextlib.asynccontextmanager
async def _kvmesh(
    connection: ServerOptions, workload: WorkloadOptions, load: LoadOptions
) -> AsyncIterator[BenchServer]:
    async with connection.async_client() as client:
        info = await client.model_info()

        async def count_tokens(text: str) -> int:
            return len((await client.tokenize(text)).token_ids)

        where = resolve_target(connection.target, os.environ)
        target = GrpcTarget(
            client,
            f"{info.model} at {where}, gRPC",
            temperature=workload.temperature,
            ignore_eos=not workload.stop_at_eos,
        )
        prompts = _prompts(workload)
        high = min(prompts.high, info.vocab_size)
        prompts = replace(prompts, low=min(prompts.low, high - 1), high=high)
        yield BenchServer(target, prompts, count_tokens)


@contextlib.asynccontextmanager
async def _openai(
    connection: ServerOptions, workload: WorkloadOptions, load: LoadOptions
) -> AsyncIterator[BenchServer]:
    assert load.openai is not None

    async def count_tokens(text: str) -> int:
        raise typer.BadParameter(
            "a ShareGPT file and --openai need --tokenizer, a model whose tokens are counted"
        )

    with as_option("openai"):
        target = OpenAITarget(
            load.openai,
            model=load.model,
            api_key=connection.http_key(load.openai),
            endpoint="chat" if load.endpoint == "chat" else "completions",
            temperature=workload.temperature,
            ignore_eos=not workload.stop_at_eos,
            timeout_s=connection.timeout,
        )
    async with target:
        try:
            await target.find_model()
        except ReplyFailed as error:
            raise CommandFailed(
                f"{load.openai} does not say which models it has: {error}", ExitCode.UNREACHABLE
            ) from None
        yield BenchServer(target, _prompts(workload, words=load.endpoint == "chat"), count_tokens)


def _prompts(workload: WorkloadOptions, *, words: bool = False) -> PromptMaker:
    return PromptMaker(workload.seed, prefix_tokens=workload.prefix, words=words or workload.words)


def _local_counter(model: str) -> CountTokens:
    tokenizer = Tokenizer.load(resolve_tokenizer(model)[0])

    async def count(text: str) -> int:
        return len(tokenizer.encode(text))

    return count


async def requests_of(
    workload: WorkloadOptions, load: LoadOptions, count_tokens: CountTokens
) -> list[BenchRequest]:
    """What is to be sent, with the times of a trace or of a rate."""
    name, seed = workload.workload, workload.seed
    count = workload.requests or DEFAULT_REQUESTS
    if name == "random":
        with as_option("input"):
            prompts = LengthDistribution.parse(workload.input)
        with as_option("output"):
            outputs = LengthDistribution.parse(workload.output)
        requests = random_requests(prompts, outputs, count, seed)
    elif name == "sharegpt":
        requests = sharegpt_like(count, seed)
    elif name.endswith(".json"):
        with as_option("workload"):
            requests = await sharegpt_requests(Path(name), count, seed, count_tokens)
    elif name.endswith((".jsonl", ".csv")):
        with as_option("workload"):
            trace = read_trace(Path(name))[: workload.requests]
            requests = replayed(trace, load.speed, workload.scale)
    else:
        raise typer.BadParameter(
            f"must be random, sharegpt, or a file that ends in .json, .jsonl or .csv; got {name!r}",
            param_hint="--workload",
        )
    if load.rate is not None:
        with as_option("rate"):
            return arriving(requests, load.rate, load.burstiness, seed)
    if load.concurrency is not None:
        return [replace(request, arrival_s=None) for request in requests]
    return requests
