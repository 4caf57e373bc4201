"""Groups come and go with the load, and no stream is cut: one group, two, and one again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import pytest

from kvmesh.client import Client
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import (
    KV_LAYER_BYTES,
    SMALL_ENGINE,
    check_accounts,
    greedy_by_engine,
    processes_named,
    serving,
    small_config,
    wait_for,
    wait_idle,
)
from tests.cluster.e2e.streams import PATIENT, PROMPTS, Streams, check_complete, loads
from tests.model.shallow import LAYERS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

SHORT, LONG = 24, 300
ATTEMPTS = 5
NOISE_NATS = 0.05
# Four sequences fill a group; one in each is little enough for one group alone.
CONFIG = small_config(
    groups=2,
    engine={**SMALL_ENGINE, "kv_memory_bytes": 3 * LAYERS * KV_LAYER_BYTES // 2},
    autoscaling={"min_groups": 1, "wait_s": 0.5, "up_after_s": 0.5, "down_after_s": 5},
    timeouts={"drain_s": 1},
)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(CONFIG, tmp_path_factory.mktemp("config")) as endpoint:
        yield endpoint


def groups_up(endpoint: Endpoint) -> set[str]:
    found = loads(endpoint)
    return set() if found is None else {x.group for x in found.groups if x.healthy}


def engines() -> int:
    return len(processes_named("ray::ServeReplica:kvmesh:engine"))


def regrets(client: Client, prompt: str, output: Sequence[int]) -> list[float]:
    """By how much each token of a greedy output is less likely than the best one, in nats.

    Long outputs come to tokens that are as good as equal, between which rounding decides.
    """
    ids = client.tokenize(prompt).token_ids
    scored = client.generate([*ids, *output], prompt_logprobs=1, max_tokens=0).prompt_logprobs
    return [x.top[0].logprob - x.chosen.logprob for x in scored[len(ids) - 1 :]]


@pytest.fixture(scope="module")
def expected(endpoint: Endpoint) -> dict[str, tuple[int, ...]]:
    with Client(endpoint.target, api_key=endpoint.api_key) as client:
        ids = [client.tokenize(prompt).token_ids for prompt in PROMPTS]
    return dict(zip(PROMPTS, greedy_by_engine(CONFIG, ids, SHORT), strict=True))


async def test_a_group_is_added_and_removed_under_streams(
    endpoint: Endpoint, expected: dict[str, tuple[int, ...]]
) -> None:
    few = PROMPTS[:2]
    with Client(endpoint.target, api_key=endpoint.api_key, retry=PATIENT) as client:
        assert groups_up(endpoint) == {"engine-0"} and engines() == 1
        many = list(islice(cycle(PROMPTS), 16))
        for _ in range(ATTEMPTS):
            while len(groups_up(endpoint)) < 2:
                check_complete(await Streams(endpoint, many, SHORT).ends(), many, expected)

            # Both groups have a stream when one of them is removed, after a few idle seconds; on a
            # busy machine it may be gone before it has one, and comes again.
            streamed = await Streams(endpoint, few, LONG).ends()
            for prompt, seen in zip(few, streamed, strict=True):
                assert len(seen.token_ids) == LONG and seen.text == seen.whole_text
                assert max(regrets(client, prompt, seen.token_ids)) < NOISE_NATS
            assert [seen.resumes for seen in streamed] == [0, 0]
            if {seen.group for seen in streamed} == {"engine-0", "engine-1"}:
                break
        else:
            pytest.fail("one group had both streams every time")

        wait_for(lambda: engines() == 1, "Serve has ended the other group's processes")
        wait_for(lambda: groups_up(endpoint) == {"engine-0"}, "the router has forgotten it")
        wait_idle(client)
        found = client.loads()
        check_accounts(found)
        assert [group.group for group in found.groups] == ["engine-0"]
        assert found.router.audit_faults_total == 0
