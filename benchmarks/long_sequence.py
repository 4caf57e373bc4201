"""One very long sequence through a whole cluster, computed by eight CPU ranks that share its pages.

    python -m benchmarks.long_sequence [--tokens N] [--window N] [--json FILE]

A small model with random weights, every process real: upload over gRPC as token ids, admission,
prefill in chunks with progress events, decode; then the same again, and a rank is killed with -9
when 60% of the prompt is computed. Reported are

  output     whether both have the same greedy tokens, and how often the second was resumed
  progress   events on the prompt, and the longest time without any event
  seconds    to the first token, and for each token after it
  memory     largest resident memory of each kind of process, over that before the prompt; ranks
             touch most of their pool with it for the first time
  pages      used when all has ended

Without --window the work grows with the square of the length: a million tokens take hours.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.control_plane.__main__ import HERE, commit_of, conditions
from benchmarks.control_plane.processes import ClusterProcesses
from kvmesh.client import Client, Delta, Prefilling, RetryPolicy
from kvmesh.cluster.config import build
from kvmesh.cluster.lifecycle import Cluster
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.source import resolve_model

RESULTS = HERE / "benchmarks" / "results" / "long_sequence.json"
RANKS = 8
OUTPUT_TOKENS = 32
KILLED_AT = 0.6
HEADS, HEAD_DIM = 2, 32
TOKEN_BYTES = 80  # of k8v4 with one KV head, and some to spare
MIB = 1 << 20


@contextmanager
def small_model(tokens: int, window: int | None) -> Iterator[Path]:
    """A directory with one layer of Mistral's architecture, random weights, and the embedded
    model's tokenizer. window: of its attention, None for the whole context"""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        hidden_size=RANKS * HEADS * HEAD_DIM // 4,
        intermediate_size=256,
        vocab_size=49_152,
        max_position_embeddings=tokens + 1024,
        sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        bos_token_id=0,
        eos_token_id=0,
    )
    with tempfile.TemporaryDirectory(prefix="kvmesh-sequence-") as name:
        path = Path(name) / "small"
        transformers.MistralForCausalLM(config).save_pretrained(path)
        source = resolve_model(EMBEDDED_NAME).path
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / file).symlink_to(source / file)
        yield path


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of one stream.

    progress: the counts of computed tokens that were reported to it
    """

    token_ids: tuple[int, ...]
    first_token_s: float
    step_s: float
    longest_silence_s: float
    progress: tuple[int, ...]
    resumes: int
    failovers: int

    def figures(self) -> dict[str, float]:
        """Without the tokens; of the progress, how often it came."""
        figures = asdict(self)
        del figures["token_ids"]
        return {**figures, "progress": len(self.progress)}


def stream(
    client: Client, ids: list[int], salt: str, at_progress: Callable[[int], None] = lambda _: None
) -> Seen:
    """Generate after the prompt. at_progress: called with every count of computed tokens"""
    began_s = last_s = time.perf_counter()
    first_s, silence_s, progress = 0.0, 0.0, list[int]()
    generation = client.generate_stream(
        ids,
        max_tokens=OUTPUT_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        cache_salt=salt,
        timeout_s=None,
    )
    tokens: list[int] = []
    for event in generation.events():
        now_s = time.perf_counter()
        silence_s, last_s = max(silence_s, now_s - last_s), now_s
        match event:
            case Prefilling():
                progress.append(event.computed_tokens)
                at_progress(event.computed_tokens)
            case Delta() if event.token_ids:
                first_s = first_s or now_s - began_s
                tokens.extend(event.token_ids)
    assert generation.usage is not None
    return Seen(
        tuple(tokens),
        first_s,
        (last_s - began_s - first_s) / (OUTPUT_TOKENS - 1),
        silence_s,
        tuple(progress),
        generation.resumes,
        generation.usage.failovers,
    )


class Killing:
    """Kills one rank, once, when that many tokens are computed."""

    def __init__(self, processes: ClusterProcesses, tokens: int) -> None:
        self._processes = processes
        self._tokens = tokens
        self.killed_at: int | None = None

    def __call__(self, computed: int) -> None:
        if self.killed_at is None and computed >= self._tokens:
            self.killed_at = computed
            os.kill(self._processes.of_kind("rank")[0], signal.SIGKILL)


def used_pages(client: Client) -> int:
    return sum(arena.used for group in client.loads().groups for arena in (group.hot, group.sealed))


def measure(tokens: int, window: int | None) -> dict[str, object]:
    ids = np.random.default_rng(0).integers(1_000, 40_000, tokens).tolist()
    with small_model(tokens, window) as model:
        config = build(
            {
                "model": str(model),
                "ingress": {"port": 0, "http_port": 0},
                "auth": {"mode": "none"},
                "engine": {
                    "tp": 1,
                    "kvp": RANKS,
                    "kv_format": "k8v4",
                    "kv_memory_bytes": tokens * TOKEN_BYTES // RANKS + 16 * MIB,
                    "max_num_batched_tokens": 4096,
                    "kv_probe": "off",
                    "cpus_per_rank": 0.1,
                    "device": "cpu",
                },
            }
        )
        with Cluster(config) as endpoint:
            processes = ClusterProcesses(frozenset())
            patient = RetryPolicy(max_attempts=20, max_backoff_s=5.0)
            with Client(endpoint.target, retry=patient) as client:
                client.generate(ids[:64], max_tokens=2, temperature=0.0)
                processes.reset_peaks()
                before = processes.peak_bytes()
                undisturbed = stream(client, ids, "first")
                peaks = processes.peak_bytes()
                killing = Killing(processes, int(KILLED_AT * tokens))
                disturbed = stream(client, ids, "second", killing)
                return {
                    "tokens": tokens,
                    "window": window,
                    "undisturbed": undisturbed.figures(),
                    "disturbed": disturbed.figures(),
                    "killed_at": killing.killed_at,
                    "equal": undisturbed.token_ids == disturbed.token_ids,
                    "peak_mib": {kind: (peaks[kind] - before[kind]) / MIB for kind in peaks},
                    "used_pages": used_pages(client),
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1 << 17)
    parser.add_argument("--window", type=int, help="of attention; default: the whole context")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = measure(arguments.tokens, arguments.window)
    report = {**conditions(), "commit": commit_of(HERE), **found}
    # One for each length and window, the latest of each.
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    results[f"{arguments.tokens} tokens, window {arguments.window}"] = report
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
