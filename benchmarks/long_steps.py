"""CPU time of an engine's steps by context: scheduling, pages, plans on the wire, arrays.

    python -m benchmarks.long_steps [--json FILE]

The engine, its scheduler and its prefix cache are real; ranks answer at once. `decode` is the time
of a step of one sequence besides the ranks', `wire` writing its plan and reading it again, as every
step does for every rank, `arrays` what a rank prepares before it computes. The last two columns
are what a prompt costs once: to admit and end it with all of its pages in the prefix cache, and
to hash them. Each figure is the smallest of five rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.control_plane.__main__ import HERE, commit_of, conditions
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription, StepByStep
from kvmesh.workers.plan import SampledToken, StepPlan, StepResult
from kvmesh.workers.prefix_cache import PageDigests
from kvmesh.workers.rank_pages import RankPages
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.request_check import check_request
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.step import StepArrays

RESULTS = HERE / "benchmarks" / "results" / "long_steps.json"
PAGE = 64
CONTEXTS = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
ROUNDS = 5
STEPS = 4 * PAGE  # over several page boundaries


class AnsweringExecutor(StepByStep):
    """Samples the same token always, and keeps the last plan."""

    num_ranks = 1

    def __init__(self) -> None:
        super().__init__()
        self.spent_s = 0.0
        self.plan: StepPlan | None = None

    def describe(self) -> list[RankDescription]:
        return [
            RankDescription(
                model="none",
                model_revision="none",
                dtype="float32",
                vocab_size=50_000,
                max_model_len=1 << 21,
                eos_token_ids=(),
                sink_pages=1,
                recent_pages=2,
                hot_page_bytes=4,
                sealed_page_bytes=1,
                kv_budget_bytes=1 << 16,
                head_dim=64,
            )
        ]

    def divergences(self, kv_formats: list[str]) -> list[float]:
        return [0.0] * len(kv_formats)

    def allocate(self, allocation: Allocation) -> None:
        """There is no pool."""

    def execute(self, plan: StepPlan, masks: MakeMasks | None = None) -> StepResult:
        self.plan = plan
        sampled = [SampledToken(7) for chunk in plan.chunks if chunk.sample]
        return StepResult(plan.step, sampled, 0.0)

    def close(self) -> None:
        """There are no ranks."""


def _seconds(work: Callable[[], Any]) -> float:
    """CPU time, which others on the machine do not add to."""
    began_s = time.thread_time()
    work()
    return time.thread_time() - began_s


_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(StepPlan)


def _over_the_wire(plan: StepPlan) -> StepPlan:
    return _DECODER.decode(_ENCODER.encode(plan))


def measure(context: int) -> dict[str, float]:
    gc.collect()
    gc.freeze()  # as in a replica
    executor = AnsweringExecutor()
    config = EngineConfig(model="none", page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=8192)
    engine = Engine(config, executor)
    ids = np.random.default_rng(0).integers(1, 50_000, context).astype(np.int32)

    def request(name: str, prompt: np.ndarray[Any, Any], tokens: int) -> EngineRequest:
        return EngineRequest(name, prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))

    engine.add(request("long", ids, STEPS + 2))
    while not (deltas := engine.step()) or not any(delta.token_ids for delta in deltas):
        pass
    steps, wires, arrays = [], [], []
    tables = np.zeros((4, (1 << 21) // PAGE), np.int64)
    for _ in range(STEPS):
        steps.append(_seconds(engine.step))
        plan = executor.plan
        assert plan is not None
        wires.append(_seconds(partial(_over_the_wire, plan)))
        arrays.append(_seconds(partial(StepArrays.of, plan, tables, PAGE, RankPages(1, 0, 4))))
    while engine.has_work:
        engine.step()
    again = np.append(ids, np.int32(5))
    check_request(request("again", again, 1), engine.info)
    engine.add(request("again", again, 1))
    admit_s = _seconds(engine.step)
    assert engine.loads().cached_tokens_total >= context - 4 * PAGE
    digests = PageDigests(PAGE, "")
    return {
        "context": context,
        "decode_us": statistics.median(steps) * 1e6,
        "wire_us": statistics.median(wires) * 1e6,
        "arrays_us": statistics.median(arrays) * 1e6,
        "admit_and_end_ms": admit_s * 1e3,
        "hash_ms": _seconds(lambda: digests.upto(ids, context // PAGE)) * 1e3,
    }


def fastest(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Each figure's smallest: a busy machine only adds to them."""
    return {name: min(each[name] for each in rounds) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = [fastest([measure(context) for _ in range(ROUNDS)]) for context in CONTEXTS]
    report = {**conditions(), "commit": commit_of(HERE), "rows": rows}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{name} {value:,.0f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
