"""How many sequences and tokens a step may have, where the settings leave it open."""

from __future__ import annotations

import msgspec
import pytest

from kvmesh.workers.config import EngineConfig
from kvmesh.workers.device_limits import DeviceLimits
from kvmesh.workers.engine import Engine
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.executor import RankDescription
from tests.workers.memory_executor import MemoryExecutor

GB, GIB = 10**9, 1 << 30


def config(**settings: object) -> EngineConfig:
    return EngineConfig.model_validate({"model": "memory", **settings})


@pytest.mark.parametrize(
    ("device", "memory_bytes", "expected"),
    [
        ("cpu", 0, DeviceLimits(16, 512, False)),
        ("cpu", 512 * GIB, DeviceLimits(16, 512, False)),
        ("cuda", 80 * GB, DeviceLimits(256, 8192, True)),
        ("cuda", 79 * GIB, DeviceLimits(256, 8192, True)),
        ("cuda", 141 * GB, DeviceLimits(256, 8192, True)),
        ("cuda", 48 * GB, DeviceLimits(256, 4096, True)),
        ("cuda", 40 * GB, DeviceLimits(256, 4096, True)),
        ("cuda", 24 * GB, DeviceLimits(128, 2048, True)),
        ("cuda", 16 * GB, DeviceLimits(64, 1024, True)),
        ("cuda", 0, DeviceLimits(64, 1024, True)),
    ],
)
def test_auto_follows_the_device(device: str, memory_bytes: int, expected: DeviceLimits) -> None:
    assert config().limits(device, memory_bytes) == expected


def test_what_is_given_stays() -> None:
    given = config(max_num_seqs=7, max_num_batched_tokens="99", cuda_graphs=False)
    assert given.limits("cuda", 80 * GB) == DeviceLimits(7, 99, False)
    assert config(cuda_graphs=True).limits("cpu") == DeviceLimits(16, 512, False)


def test_auto_makes_room_for_what_is_given() -> None:
    """Every running sequence can decode in every step."""
    assert config(max_num_seqs=900).limits("cpu") == DeviceLimits(900, 900, False)
    assert config(max_num_batched_tokens=5).limits("cpu") == DeviceLimits(5, 5, False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_num_seqs", 0, "must be greater than or equal to 1"),
        ("max_num_seqs", "many", "must be a whole number"),
        ("max_num_batched_tokens", "Auto", "must be a whole number"),
        ("max_num_batched_tokens", 1.5, "must be a whole number"),
        ("cuda_graphs", 1, "must be true or false"),
        ("cuda_graphs", "maybe", "must be true or false"),
    ],
)
def test_other_values_are_refused_by_their_name(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**{name: value})
    assert caught.value.field == name


class GpuRanks(MemoryExecutor):
    """Two ranks on GPUs of different sizes."""

    def describe(self) -> list[RankDescription]:
        ranks = zip(super().describe(), (80 * GB, 24 * GB), strict=True)
        return [
            msgspec.structs.replace(rank, device="cuda", memory_bytes=memory_bytes)
            for rank, memory_bytes in ranks
        ]


def test_the_smallest_gpu_of_a_group_decides_and_the_router_sees_it() -> None:
    executor = GpuRanks(page_size=16, sink=1, recent=1, budget_pages=10_000)
    info = Engine(config(page_size=16), executor).info
    # By itself; exact pages of so many sequences would take more than their share of the memory.
    assert info.max_num_batched_tokens == 2048
    assert info.max_num_seqs == 61 < 128
    assert info.device == "cuda"
