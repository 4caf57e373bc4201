"""The router compared with other systems' rules, on public traces, in simulation.

For each setting the benchmark finds the load at which the best of the other rules has a p99
time to first token of five times that of idle engines. The router and the better rules run at
loads around it; then with three prompts of 2**20 tokens added, if they fit.

    python benchmarks/routing.py TRACES [--setting NAME ...] [--json FILE]

TRACES is a folder with mooncake_conversation.jsonl and azure_conv_2023.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.simulator.hardware import GPUS, MODELS
from kvmesh.cluster.simulator.metrics import Objective, Summary, summarize
from kvmesh.cluster.simulator.policies import PEERS
from kvmesh.cluster.simulator.service_time import EngineShape, ServiceTime
from kvmesh.cluster.simulator.simulation import Scenario, simulate
from kvmesh.cluster.simulator.trace import TraceRequest, at_rate, inject_long, read_trace
from kvmesh.kernels.formats.registry import get_format

GROUPS = 8
OVERLOAD = 5.0
MILLION = 1 << 20
LOADS = (0.9, 1.0, 1.05)
LOAD_WITH_LONG = 0.8
SHOWN = ("vllm-dp", "prefix-affinity", "prefix-tree", "dynamo", "kvmesh")


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    trace: str
    kv_format: str
    gpu: str
    gpus: int
    model: str
    max_tokens: int
    guess: float  # initial guess of the rate
    chunk_tokens: int = 2048
    inject: bool = False


MOONCAKE, AZURE = "mooncake_conversation.jsonl", "azure_conv_2023.csv"
SETTINGS = {
    "mooncake-exact": Setting(MOONCAKE, "exact", "h100", 1, "llama-3-8b", 2000, 2.1),
    "mooncake-int4": Setting(MOONCAKE, "int4", "h100", 1, "llama-3-8b", 2000, 2.8),
    "mooncake-70b": Setting(MOONCAKE, "int8", "h100", 4, "llama-3-70b", 2000, 0.9),
    "azure-40g": Setting(AZURE, "exact", "a100-40g", 1, "llama-3-8b", 1000, 4.6, chunk_tokens=512),
    "million": Setting(MOONCAKE, "int4", "h100", 8, "llama-3-8b", 2000, 22.0, inject=True),
}


class Bench:
    """One setting: runs policies on it at a rate."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting = setting
        model, fmt = MODELS[setting.model], get_format(setting.kv_format)
        self.shape = EngineShape(
            GPUS[setting.gpu],
            model,
            fmt,
            setting.gpus,
            max_num_batched_tokens=setting.chunk_tokens,
        )
        self.service = ServiceTime.of(self.shape)
        self.requests = read_trace(folder / setting.trace)

    @property
    def idle_p99_s(self) -> float:
        chunk = self.shape.max_num_batched_tokens
        alone = [self.service.alone(x.prompt_tokens, chunk) for x in self.requests]
        return float(np.percentile(alone, 99))

    def run(self, policy: str, rate: float, inject: int = 0) -> Summary:
        requests: Sequence[TraceRequest] = at_rate(self.requests, rate)
        if inject:
            requests = inject_long(requests, inject, MILLION)
        router = RouterConfig(queue_limit=1_000_000)
        shapes = [self.shape] * GROUPS
        scenario = Scenario(shapes, requests, self.setting.max_tokens, router=router)
        run = simulate(scenario, policy)
        chunk = self.shape.max_num_batched_tokens
        summary = summarize(run, self.service, chunk, Objective())
        print(
            f"  {policy:16s} x{rate:.3f} goodput {summary.goodput_rps:6.2f} "
            f"({summary.attainment:.1%})  TTFT p50 {summary.ttft_s['p50']:.2f} "
            f"p99 {summary.ttft_s['p99']:.2f} short p99 {summary.short_ttft_p99_s:.2f}  "
            f"preempted {summary.preemptions}  long TTFT {[round(x) for x in summary.long_ttft_s]}",
            file=sys.stderr,
            flush=True,
        )
        return summary

    def overload_rate(self) -> float:
        """Where the best peer's p99 TTFT is OVERLOAD times the idle one, to within one percent."""
        limit = OVERLOAD * self.idle_p99_s
        low, high = 0.0, self.setting.guess
        while self._best_peer_p99(high, limit) < limit:
            low, high = high, high * 1.15
        low = low or high * 0.8
        while high / low > 1.01:
            middle = (low + high) / 2
            low, high = (
                (low, middle) if self._best_peer_p99(middle, limit) >= limit else (middle, high)
            )
        return high

    def _best_peer_p99(self, rate: float, limit: float) -> float:
        best = float("inf")
        for policy in ("dynamo", *(name for name in PEERS if name != "dynamo")):
            best = min(best, self.run(policy, rate).ttft_s["p99"])
            if best < limit:
                break
        return best


def measure(name: str, folder: Path, rate: float | None) -> dict[str, object]:
    bench = Bench(SETTINGS[name], folder)
    rate = rate or bench.overload_rate()
    curve = {load: [bench.run(policy, rate * load) for policy in SHOWN] for load in LOADS}
    peers = [x for x in curve[1.0] if x.policy in PEERS]
    (own,) = (x for x in curve[1.0] if x.policy == "kvmesh")
    best = max(peers, key=lambda x: x.goodput_rps)
    injected: list[dict[str, object]] = []
    if bench.setting.inject:
        for policy in ("dynamo", "kvmesh"):
            for count in (0, 3):
                summary = bench.run(policy, rate * LOAD_WITH_LONG, count)
                injected.append({"long_requests": count, **dataclasses.asdict(summary)})
    return {
        "setting": dataclasses.asdict(bench.setting),
        "groups": GROUPS,
        "objective": dataclasses.asdict(Objective()),
        "idle_p99_ttft_s": bench.idle_p99_s,
        "rate": rate,
        "best_peer": best.policy,
        "over_best_peer": own.goodput_rps / best.goodput_rps,
        "p99_over_best_peer": own.ttft_s["p99"] / min(x.ttft_s["p99"] for x in peers),
        "curve": {f"{x:.2f}": [dataclasses.asdict(y) for y in rows] for x, rows in curve.items()},
        "injected": injected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--setting", action="append", choices=sorted(SETTINGS))
    parser.add_argument("--rate", type=float, help="use this load instead of searching for it")
    parser.add_argument("--rates-of", type=Path, help="use the loads of an earlier result")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    earlier = json.loads(arguments.rates_of.read_text()) if arguments.rates_of else {}
    for name in arguments.setting or SETTINGS:
        print(name, file=sys.stderr, flush=True)
        results[name] = measure(
            name, arguments.traces, arguments.rate or earlier.get(name, {}).get("rate")
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
