"""The cost of sealing on a CPU: its share of the decode steps of 16 requests, by format.

    python -m benchmarks.sealing [--kv-format F[,F...]] [--tokens N] [--json FILE]

The engine decodes 16 requests of different lengths with the embedded model, so that their
pages fill at different steps, as in serving; the time in `seal_layers` is divided by the
time of all decode steps. A sequence seals one page per 64 tokens, so with `--tokens 64`
each sequence seals once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.engine import make_engine, prompt_of
from kvmesh.kernels.formats.registry import format_names, get_format
from kvmesh.kernels.seal import seal_layers
from kvmesh.workers import runner
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams

SEQUENCES = 16


class _Timed:
    """An operator whose time is measured."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.spent_s = 0.0
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> None:
        start_s = time.perf_counter()
        self.operator(*args, **options)
        self.spent_s += time.perf_counter() - start_s
        self.calls += 1


def measure(kv_format: str, tokens: int) -> dict[str, float | str | int]:
    engine = make_engine(kv_format, SEQUENCES)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for index in range(SEQUENCES):
        ids = np.array(prompt_of(400 + 5 * index, index), np.int32)
        engine.add(EngineRequest(str(index), ids, params))
    waiting = SEQUENCES
    while waiting:  # until every request has its first token
        waiting -= sum(1 for delta in engine.step() if delta.token_ids)
    timed = _Timed(seal_layers)
    with patch.object(runner, "seal_layers", timed):
        start_s = time.perf_counter()
        steps = 0
        while engine.has_work:
            engine.step()
            steps += 1
        total_s = time.perf_counter() - start_s
    return {
        "kv_format": kv_format,
        "steps": steps,
        "step_ms": 1e3 * total_s / steps,
        "seal_calls": timed.calls,
        "seal_ms": 1e3 * timed.spent_s / max(timed.calls, 1),
        "share": timed.spent_s / total_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    served = [n for n in format_names() if not get_format(n).needs_calibration]
    parser.add_argument("--kv-format", default=",".join(served))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{'format':16} {'decode step':>12} {'sealing':>16} {'share of all steps':>19}")
    for name in options.kv_format.split(","):
        row = measure(name, options.tokens)
        rows.append(row)
        print(
            f"{name:16} {row['step_ms']:9.1f} ms {row['seal_ms']:13.2f} ms"
            f" {100 * float(row['share']):17.2f} %",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
