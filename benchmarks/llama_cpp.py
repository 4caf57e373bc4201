"""The embedded model on CPUs, compared with llama.cpp on the same file, in one run.

    pip install xllamacpp==2026.10.11549    # llama.cpp in a wheel; nothing else here needs it
    python -m benchmarks.llama_cpp [--threads N] [--rounds R] [--max-prompt TOKENS] [--json FILE]

CPU milliseconds of a decode step after prompts of some lengths, for one stream and for sixteen, and
prompt tokens a CPU second. llama.cpp reads the GGUF file with keys and values in q8_0 and flash
attention, the engine the same weights, converted, with keys and values in int8; both greedy.

A round asks for one token of new prompts, which is their prefill, then with those cached for one
and for many: a step's time is the difference of the last two. Both sides alternate, and each figure
is the smallest of the rounds, since a busy machine only adds to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.control_plane.__main__ import HERE, commit_of, conditions
from benchmarks.engine import prompt_of
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.local import local_executor
from kvmesh.workers.model.embedded import EMBEDDED_NAME, fetch_embedded
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams

RESULTS = HERE / "benchmarks" / "results" / "llama_cpp.json"
TOKENS = 48
MAX_STREAMS = 16
# streams, tokens of each prompt
CASES = ((1, 100), (1, 512), (1, 2048), (1, 6000), (16, 64))

# prompts, tokens to generate for each; a prompt that was computed before is found in a cache
Run = Callable[[list[list[int]], int], None]

NOT_INSTALLED = """llama.cpp is not installed: pip install xllamacpp==2026.10.11549
"""

console = Console()


@dataclass(frozen=True)
class Row:
    """CPU time of both sides; ratios above 1 say that kvmesh is faster."""

    streams: int
    prompt_tokens: int
    step_ms: float
    llama_cpp_step_ms: float
    prompt_tokens_per_s: float
    llama_cpp_prompt_tokens_per_s: float

    @property
    def decode_ratio(self) -> float:
        return self.llama_cpp_step_ms / self.step_ms

    @property
    def prefill_ratio(self) -> float:
        return self.prompt_tokens_per_s / self.llama_cpp_prompt_tokens_per_s


def kvmesh_runs(threads: int) -> Run:
    config = EngineConfig(
        model=EMBEDDED_NAME,
        kv_format="int8",
        max_num_seqs=MAX_STREAMS,
        threads_per_rank=threads,
        kv_probe="off",
    )
    engine = Engine(config, local_executor(config))

    def run(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            engine.add(EngineRequest(str(index), np.array(prompt, np.int32), params))
        while engine.has_work:
            engine.step()

    return run


def llama_cpp_runs(gguf: Path, threads: int, streams: int, context: int) -> Run:
    """xllamacpp's server in this process, asked as its users do."""
    llama: Any = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel = streams * context, streams
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_Q8_0
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.verbosity = -1
    server = llama.Server(params)

    def ask(prompt: list[int], tokens: int) -> None:
        server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": tokens,
                "temperature": 0,
                "samplers": ["top_k"],
                "top_k": 1,
                "ignore_eos": True,
                "cache_prompt": True,
            }
        )

    def run(prompts: list[list[int]], tokens: int) -> None:
        asking = [threading.Thread(target=ask, args=(prompt, tokens)) for prompt in prompts]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()

    return run


def cpu_s(run: Run, prompts: list[list[int]], tokens: int) -> float:
    began_s = time.process_time()
    run(prompts, tokens)
    return time.process_time() - began_s


def prefill_and_step_s(run: Run, prompts: list[list[int]]) -> tuple[float, float]:
    """Of prompts that were not computed before."""
    prefill_s = cpu_s(run, prompts, 1)
    one_s, many_s = (cpu_s(run, prompts, tokens) for tokens in (1, 1 + TOKENS))
    return prefill_s, (many_s - one_s) / TOKENS


def measure(ours: Run, theirs: Run, streams: int, length: int, rounds: int) -> Row:
    seeds = itertools.count(1000 * length)  # no prompt begins like another
    for run in (ours, theirs):
        run([prompt_of(length, next(seeds))], 2)  # warm up
    found: list[tuple[float, ...]] = []
    for _ in range(rounds):
        prompts = [prompt_of(length, next(seeds)) for _ in range(streams)]
        found.append(
            tuple(spent for run in (ours, theirs) for spent in prefill_and_step_s(run, prompts))
        )
    prefill_s, step_s, their_prefill_s, their_step_s = map(min, zip(*found, strict=True))
    return Row(
        streams,
        length,
        step_s * 1e3,
        their_step_s * 1e3,
        streams * length / prefill_s,
        streams * length / their_prefill_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-prompt", type=int, default=6000, help="leave longer prompts out")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("xllamacpp") is None:
        parser.exit(message=NOT_INSTALLED)
    ours = kvmesh_runs(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        gguf = fetch_embedded(Path(directory), lambda _what, _share: None)
        for streams, length in CASES:
            if length > arguments.max_prompt:
                continue
            theirs = llama_cpp_runs(gguf, arguments.threads, streams, length + TOKENS + 16)
            rows.append(measure(ours, theirs, streams, length, arguments.rounds))
    found = [
        {**asdict(row), "decode_ratio": row.decode_ratio, "prefill_ratio": row.prefill_ratio}
        for row in rows
    ]
    report = {**conditions(), "commit": commit_of(HERE), "threads": arguments.threads}
    arguments.json.write_text(json.dumps({**report, "rows": found}, indent=1) + "\n")
    table = Table("streams", "prompt", "step", "llama.cpp", "ratio", "prompt", "llama.cpp", "ratio")
    for row in rows:
        table.add_row(
            str(row.streams),
            f"{row.prompt_tokens:,}",
            f"{row.step_ms:.1f} ms",
            f"{row.llama_cpp_step_ms:.1f} ms",
            f"{row.decode_ratio:.2f}",
            f"{row.prompt_tokens_per_s:.0f}/s",
            f"{row.llama_cpp_prompt_tokens_per_s:.0f}/s",
            f"{row.prefill_ratio:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
