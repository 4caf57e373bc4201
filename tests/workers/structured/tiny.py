"""An engine on a tiny model with random weights, and what it generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.constraint import OutputConstraint
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import InProcessExecutor
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.request import EndReason, EngineRequest, SampledLogprobs, SequenceUsage
from kvmesh.workers.request_check import check_request
from kvmesh.workers.sampling_params import SamplingParams
from tests.model.small import make_small_model, make_small_tokenizer

PADDING = 7  # ids of the model that its tokenizer does not have
PROMPT = [40, 41, 42, 43, 44]
_DIRECTORY = TemporaryDirectory()


@dataclass
class Output:
    """What a sequence has got so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[SampledLogprobs] = field(default_factory=list)
    end: EndReason | None = None
    error: str | None = None
    usage: SequenceUsage | None = None

    @property
    def text(self) -> str:
        return tokenizer().decode(self.tokens)


@cache
def model_path() -> Path:
    path = Path(_DIRECTORY.name)
    size = make_small_tokenizer(path)
    make_small_model(
        "LlamaForCausalLM", path, vocab_size=size + PADDING, max_position_embeddings=1024
    )
    return path


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(model_path())


def config_of(**changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "page_size": 16,
        "kv_format": "exact",
        "max_num_batched_tokens": 128,
        "threads_per_rank": 1,
    }
    return EngineConfig(model=str(model_path()), **{**values, **changes})


@cache
def engine(in_flight: int = 2) -> Engine:
    """in_flight: steps; one would do on a CPU, where two are harder"""
    config = config_of()
    executor = InProcessExecutor(config)
    executor.max_in_flight = in_flight
    return Engine(config, executor)


def request(
    name: str,
    constraint: OutputConstraint | None,
    prompt: Sequence[int] = PROMPT,
    resumed: Sequence[int] = (),
    **params: Any,
) -> EngineRequest:
    values: Mapping[str, Any] = {"temperature": 1.5, "max_tokens": 100, "seed": 1, **params}
    return EngineRequest(
        name,
        np.array([*prompt, *resumed], dtype=np.int32),
        SamplingParams(**values),
        resumed_tokens=len(resumed),
        constraint=constraint,
    )


def generate(*requests: EngineRequest) -> dict[str, Output]:
    """Run them together on the engine, to their ends."""
    return generate_on(engine(), *requests)


def generate_on(used: Engine, *requests: EngineRequest) -> dict[str, Output]:
    """Run them together, to their ends."""
    outputs = {made.request_id: Output() for made in requests}
    for made in requests:
        check_request(made, used.info)
    used.add(*requests)
    while used.has_work:
        for delta in used.step():
            output = outputs[delta.request_id]
            output.tokens += delta.token_ids
            output.logprobs += delta.logprobs
            output.end, output.error = delta.finish_reason, delta.error
            output.usage = delta.usage
    used.check_integrity()
    return outputs
