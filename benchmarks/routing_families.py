"""The router compared with simple rules, on families of made-up traces, at every load.

    python -m benchmarks.routing_families [--requests N] [--json FILE] [--plots DIR]

What must hold at each family and load: the router's p99 time to first token is at most 1.1
times that of the best rule, unless it is within the objective; and its goodput is at least 0.98
times that of the best rule of which the same is true. A rule that lets some requests wait for
very long may have more goodput.

Where KV pages are short, p99 may be up to 1.35 times the best rule's: rules admit what fits now
and preempt later, the router admits what it can finish.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.simulator.metrics import Objective, Summary, summarize
from kvmesh.cluster.simulator.plots import plot_families
from kvmesh.cluster.simulator.policies import PEERS
from kvmesh.cluster.simulator.service_time import ServiceTime
from kvmesh.cluster.simulator.simulation import Scenario, simulate
from kvmesh.cluster.simulator.synthetic import FAMILIES, synthetic_trace, workload_of
from kvmesh.cluster.simulator.trace import at_rate

GROUPS = 4
LOADS = (0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
MAX_P99 = {"prefill": 1.1, "decode": 1.1, "kv": 1.35}  # by workload
MIN_GOODPUT = 0.98


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """All policies at one family and load, by name."""

    family: str
    load: float
    summaries: Mapping[str, Summary]

    @property
    def p99_ratio(self) -> float:
        """Of the best rule's p99 time to first token."""
        return self._own.ttft_s["p99"] / self._best_p99_s

    @property
    def goodput_ratio(self) -> float:
        """Of the best goodput of a rule whose p99 is within the bound, too."""
        best = max(x.attainment for x in self._peers if x.ttft_s["p99"] <= self._max_p99_s)
        return self._own.attainment / best

    @property
    def any_goodput_ratio(self) -> float:
        """Of the best goodput of any rule."""
        return self._own.attainment / max(x.attainment for x in self._peers)

    @property
    def holds(self) -> bool:
        within = self._own.ttft_s["p99"] <= self._max_p99_s
        return within and self.goodput_ratio >= MIN_GOODPUT

    def __str__(self) -> str:
        own = self._own
        return (
            f"{self.family:24s} load {self.load:.2f}: goodput {own.attainment:6.1%}, "
            f"{self.goodput_ratio:.2f} of the best ({self.any_goodput_ratio:.2f} of any); TTFT "
            f"p99 {own.ttft_s['p99']:.2f} s, {self.p99_ratio:.2f} of the best; TPOT p99 "
            f"{own.tpot_s['p99']:.3f} s{'' if self.holds else '  BEYOND A BOUND'}"
        )

    @property
    def _own(self) -> Summary:
        return self.summaries["kvmesh"]

    @property
    def _peers(self) -> list[Summary]:
        return [x for name, x in self.summaries.items() if name in PEERS]

    @property
    def _max_p99_s(self) -> float:
        return max(MAX_P99[self.family.split("-")[0]] * self._best_p99_s, Objective().ttft_s)

    @property
    def _best_p99_s(self) -> float:
        return min(x.ttft_s["p99"] for x in self._peers)


def measure(
    family: str, load: float, requests: int, policies: Iterable[str], seed: int = 0
) -> Cell:
    """Run a family's trace at a load under each policy."""
    workload = workload_of(family)
    shape, service = workload.shape, ServiceTime.of(workload.shape)
    scenario = Scenario(
        [shape] * GROUPS,
        at_rate(synthetic_trace(family, requests, seed, GROUPS), load),
        max_tokens=workload.outputs[1],
        router=RouterConfig(queue_limit=1_000_000),
        seed=seed,
    )
    chunk, objective = shape.max_num_batched_tokens, Objective()
    runs = {name: simulate(scenario, name) for name in policies}
    return Cell(
        family,
        load,
        {name: summarize(run, service, chunk, objective) for name, run in runs.items()},
    )


def curves(cells: Sequence[Cell]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By family and policy, what is measured at each load."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for cell in cells:
        for name, summary in cell.summaries.items():
            point = {
                "load": cell.load,
                "goodput": round(summary.attainment, 4),
                **{f"ttft_{key}_s": round(value, 3) for key, value in summary.ttft_s.items()},
                **{f"tpot_{key}_s": round(value, 4) for key, value in summary.tpot_s.items()},
            }
            found.setdefault(cell.family, {}).setdefault(name, []).append(point)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path)
    arguments = parser.parse_args()
    cells = []
    for family in FAMILIES:
        for load in LOADS:
            cell = measure(family, load, arguments.requests, (*PEERS, "kvmesh"), arguments.seed)
            print(cell, file=sys.stderr, flush=True)
            cells.append(cell)
    beyond = [cell for cell in cells if not cell.holds]
    print(f"{len(cells) - len(beyond)} of {len(cells)} within both bounds", file=sys.stderr)
    if arguments.json:
        result = {
            "groups": GROUPS,
            "requests": arguments.requests,
            "seed": arguments.seed,
            "objective": dataclasses.asdict(Objective()),
            "beyond_a_bound": [str(cell) for cell in beyond],
            "curves": curves(cells),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plots:
        plot_families(curves(cells), arguments.plots)


if __name__ == "__main__":
    main()
