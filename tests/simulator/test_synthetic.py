"""Made-up traces: each family is what its name says."""

from __future__ import annotations

from statistics import fmean, pstdev

import pytest

from kvmesh.cluster.simulator.synthetic import FAMILIES, synthetic_trace, workload_of
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_lengths_and_the_rate_of_its_workload(family: str) -> None:
    workload, groups = workload_of(family), 4
    trace = synthetic_trace(family, 2000, seed=1, groups=groups)
    assert trace == synthetic_trace(family, 2000, seed=1, groups=groups)
    assert trace != synthetic_trace(family, 2000, seed=2, groups=groups)
    shared = family.endswith("shared")
    lowest = workload.prompts[0] // 4 if shared else workload.prompts[0]
    assert all(lowest <= x.prompt_tokens <= workload.prompts[1] for x in trace)
    low, high = workload.outputs
    assert all(low <= x.output_tokens <= high for x in trace)
    assert all(len(x.blocks) == x.prompt_tokens // BLOCK_TOKENS for x in trace)
    rate_rps = len(trace) / trace[-1].arrival_s
    assert rate_rps == pytest.approx(groups * workload.rate_rps, rel=0.25)


def test_only_shared_prompts_begin_like_others() -> None:
    for family in FAMILIES:
        blocks = [block for x in synthetic_trace(family, 1000) for block in x.blocks]
        share = len(set(blocks)) / len(blocks) if blocks else 1.0
        assert (share < 0.8) == (family.endswith("shared") and bool(blocks)), family


def test_bursty_arrivals_vary_more_than_smooth_ones() -> None:
    def variation(family: str) -> float:
        """Of the requests that come in a tenth of the time of a hundred."""
        times = [x.arrival_s for x in synthetic_trace(family, 3000, seed=3)]
        width = times[-1] / 300
        counts = [sum(1 for at in times if i * width <= at < (i + 1) * width) for i in range(300)]
        return pstdev(counts) / fmean(counts)

    for workload in ("prefill", "decode", "kv"):
        bursty, smooth = (f"{workload}-{kind}-private" for kind in ("bursty", "smooth"))
        assert variation(bursty) > 1.5 * variation(smooth)


def test_an_unknown_family_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="prefill-bursty-shared"):
        synthetic_trace("bursty", 10)
