"""Two groups with different KV formats: each request is computed in the format of its group."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from kvmesh.client import AsyncClient, Client, Completion, KVFormatError
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import (
    SMALL_ENGINE,
    check_accounts,
    greedy_by_engine,
    serving,
    small_config,
    wait_for,
    wait_idle,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

FORMATS = {"engine-0": "int8", "engine-1": "k4v4"}
TOKENS = 24
CONFIG = small_config(
    groups=[{"kv_format": "int8"}, {"kv_format": "k4v4", "max_num_seqs": 2, "recent_pages": 1}]
)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(CONFIG, tmp_path_factory.mktemp("config")) as endpoint:
        yield endpoint


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Client]:
    with Client(endpoint.target, api_key=endpoint.api_key) as client:
        wait_for(lambda: len(client.model_info().groups) == len(FORMATS), "both groups are up")
        yield client
        wait_idle(client)
        loads = client.loads()
        check_accounts(loads)
        assert loads.router.audit_faults_total == 0


def test_each_group_has_its_own_engine(client: Client) -> None:
    groups = client.groups()
    assert {group.group: group.kv_format for group in groups} == FORMATS
    eight, four = groups
    assert (eight.max_num_seqs, four.max_num_seqs) == (SMALL_ENGINE["max_num_seqs"], 2)
    assert four.recent_pages == 1
    # The same memory, in half the bits.
    assert eight.hot_page_bytes == four.hot_page_bytes
    assert eight.sealed_page_bytes > 1.5 * four.sealed_page_bytes
    assert four.sealed_pages > eight.sealed_pages


async def generate_all(
    endpoint: Endpoint, prompts: list[list[int]], allowed: tuple[str, ...]
) -> list[Completion]:
    """All at once, so that no group has room for all of them."""
    async with AsyncClient(endpoint.target, api_key=endpoint.api_key) as client:
        return await asyncio.gather(
            *(
                client.generate(
                    prompt,
                    max_tokens=TOKENS,
                    ignore_eos=True,
                    temperature=0.0,
                    allowed_kv_formats=allowed,
                )
                for prompt in prompts
            )
        )


def test_requests_are_placed_by_format_and_computed_in_it(
    endpoint: Endpoint, client: Client
) -> None:
    prompts = [list(range(start, start + 130)) for start in range(1000, 7000, 1000)]
    expected = {
        group: greedy_by_engine(CONFIG, prompts, TOKENS, group)
        for group in ("engine-0", "engine-1")
    }
    assert expected["engine-0"] != expected["engine-1"], "the formats differ in their output"
    for allowed, count in ((("int8",), 2), (("k4v4",), 2), ((), len(prompts))):
        completions = asyncio.run(generate_all(endpoint, prompts[:count], allowed))
        for number, completion in enumerate(completions):
            usage = completion.usage
            assert usage.kv_format == FORMATS[usage.group]
            assert completion.choices[0].token_ids == expected[usage.group][number]
        served = {FORMATS[completion.usage.group] for completion in completions}
        assert served == set(allowed or FORMATS.values())
    with pytest.raises(KVFormatError) as caught:
        client.generate(prompts[0], max_tokens=1, allowed_kv_formats=["exact"])
    assert {verdict.group for verdict in caught.value.groups} == set(FORMATS)
