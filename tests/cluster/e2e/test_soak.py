"""Hours of mixed load by a switch: memory and open files of every process level off.

pytest tests/cluster/e2e/test_soak.py --soak-minutes 10 -s
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import psutil
import pytest

from kvmesh.client import AsyncClient, Client, OverCapacityError
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import serving, small_config, wait_idle
from tests.cluster.e2e.one_group.mutants import mutants
from tests.cluster.e2e.one_group.test_fuzz import call

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(0),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

SAMPLE_S = 5.0
STREAMS = 6
# The same mutants over and over: how much the largest of them needs shows early.
MUTANT_SEEDS = 2
CURVE_POINTS = 8
# Between the middle of the run and its end. Allocators keep pages, so memory is never flat; the GCS
# and the raylet grow once, by 14 MiB.
GROWTH_SHARE = 0.03
GROWTH_BYTES = 16 << 20
GROWTH_FILES = 8
CONFIG = small_config(ingress={"port": 0, "http_port": 0, "replicas": 2})


@dataclass(frozen=True, slots=True)
class Sample:
    """resident_bytes: without shared pages"""

    resident_bytes: int
    files: int


@pytest.fixture(scope="module")
def endpoint(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Endpoint]:
    if not pytestconfig.getoption("soak_minutes"):
        pytest.skip("needs --soak-minutes")
    with serving(CONFIG, tmp_path_factory.mktemp("config")) as endpoint:
        yield endpoint


def test_nothing_grows(endpoint: Endpoint, pytestconfig: pytest.Config) -> None:
    duration_s = 60 * pytestconfig.getoption("soak_minutes")
    samples = asyncio.run(soak(endpoint, duration_s))
    with Client(endpoint.target, api_key=endpoint.api_key) as client:
        wait_idle(client)
    grown = []
    for process, seen in samples.items():
        middle, end = window(seen, 0.4, 0.6), window(seen, 0.8, 1.0)
        parts = [
            window(seen, i / CURVE_POINTS, (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)
        ]
        curve = " ".join(f"{part.resident_bytes >> 20:>4}" for part in parts)
        line = f"{process:<40} {curve} MiB, {middle.files:>4} -> {end.files:>4} files"
        print(line)
        allowed = middle.resident_bytes * (1 + GROWTH_SHARE) + GROWTH_BYTES
        if end.resident_bytes > allowed or end.files > middle.files + GROWTH_FILES:
            grown.append(line)
    assert not grown, "\n".join(grown)


def window(seen: list[Sample], start: float, end: float) -> Sample:
    """The median between two shares of the run."""
    part = seen[int(len(seen) * start) : max(int(len(seen) * end), 1)]
    return Sample(
        int(statistics.median(sample.resident_bytes for sample in part)),
        int(statistics.median(sample.files for sample in part)),
    )


async def soak(endpoint: Endpoint, duration_s: float) -> dict[str, list[Sample]]:
    """Load the cluster; samples of each process that lives through the whole run."""
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    ends_s = time.monotonic() + duration_s
    async with asyncio.TaskGroup() as group:
        load = [group.create_task(stream(endpoint, index)) for index in range(STREAMS)]
        load.append(group.create_task(leave(endpoint)))
        load.append(group.create_task(send_mutants(endpoint)))
        while time.monotonic() < ends_s:
            for process in psutil.Process().children(recursive=True):
                with_sample(samples, process)
            await asyncio.sleep(SAMPLE_S)
        for task in load:
            task.cancel()
    longest = max(len(seen) for seen in samples.values())
    return {name: seen for name, seen in samples.items() if len(seen) > 0.9 * longest}


def with_sample(samples: dict[str, list[Sample]], process: psutil.Process) -> None:
    try:
        name = f"{process.name()[:30]} {process.pid}"
        memory = process.memory_full_info()
        samples[name].append(Sample(memory.uss, process.num_fds()))
    except psutil.Error:
        pass  # it has ended meanwhile


async def stream(endpoint: Endpoint, index: int) -> None:
    """One stream after the other, each with another prompt, until cancelled."""
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key) as client:
        for number in itertools.count():
            prompt = f"Stream {index}, request {number}: " + "and so on " * (number % 40)
            try:
                async for _ in client.generate_stream(prompt, max_tokens=24, ignore_eos=True):
                    pass
            except OverCapacityError as error:
                await asyncio.sleep(error.retry_after_s or 0.1)


async def leave(endpoint: Endpoint) -> None:
    """Clients that connect, read a little and leave, until cancelled."""
    for number in itertools.count():
        async with AsyncClient(endpoint.target, api_key=endpoint.api_key) as client:
            try:
                async for _ in client.generate_stream(f"Client {number}", max_tokens=200):
                    break
            except OverCapacityError as error:
                await asyncio.sleep(error.retry_after_s or 0.1)


async def send_mutants(endpoint: Endpoint) -> None:
    """Mutated requests, until cancelled."""
    headers = (("authorization", f"Bearer {endpoint.api_key}"),)
    options = (("grpc.max_send_message_length", -1),)
    async with grpc.aio.insecure_channel(endpoint.target, options) as channel:
        for seed in itertools.count():
            for mutant in mutants(seed % MUTANT_SEEDS, 100):
                await call(channel, headers, mutant)
