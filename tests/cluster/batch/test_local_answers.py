"""Requests of a file, answered by a cluster in this process, without its engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

import msgspec
import pytest

from kvmesh.cluster.batch import local_answers
from kvmesh.cluster.batch.errors import BatchRunError
from kvmesh.cluster.batch.line_request import LineRequest
from kvmesh.cluster.batch.local_answers import LocalAnswers
from kvmesh.cluster.config import build
from kvmesh.cluster.errors import EngineLostError, NotReadyError, RequestFaultError
from kvmesh.cluster.offline.local_cluster import LocalCluster
from kvmesh.v1 import kvmesh_pb2 as pb
from tests.cluster.machine import PATIENCE_S
from tests.cluster.openai.server import TENANT, Event, ScriptedContract, words

REQUEST = LineRequest("id", "a", "/v1/completions", b'{"prompt": "p"}', b"")


@pytest.fixture
def contract() -> ScriptedContract:
    return ScriptedContract()


@pytest.fixture
def cluster(contract: ScriptedContract, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    """One that is not started: the contract answers in place of its ingress."""
    monkeypatch.setattr(local_answers, "TENANT", TENANT)
    made = LocalCluster(build({}))
    made.ingress = contract  # type: ignore[assignment]
    return made


async def test_an_answer_is_that_of_the_front(
    cluster: LocalCluster, contract: ScriptedContract
) -> None:
    found = await LocalAnswers(cluster).answer(REQUEST)
    assert (found.status_code, found.request_id) == (200, "id")
    body = json.loads(bytes(found.body))
    assert body["choices"][0]["text"] == "Hello there."


@pytest.mark.parametrize(
    ("error", "status"), [(RequestFaultError("it fails"), 500), (RuntimeError("a defect"), 500)]
)
async def test_what_is_wrong_with_a_request_is_its_answer(
    cluster: LocalCluster, contract: ScriptedContract, error: Exception, status: int
) -> None:
    contract.script = lambda _: [error]
    answers = LocalAnswers(cluster)
    found = await answers.answer(REQUEST)
    assert found.status_code == status
    assert "error" in msgspec.json.decode(found.body)
    contract.script = words("Hello")
    assert (await answers.answer(REQUEST)).status_code == 200, "the next line is answered"


@pytest.mark.parametrize("error", [EngineLostError(), NotReadyError()])
async def test_a_lost_engine_ends_the_run_so_that_another_can_continue(
    cluster: LocalCluster, contract: ScriptedContract, error: Exception
) -> None:
    contract.script = lambda _: [error]
    with pytest.raises(BatchRunError, match="the engine has failed repeatedly"):
        await LocalAnswers(cluster).answer(REQUEST)


async def test_an_engine_that_has_failed_for_good_ends_the_run(
    cluster: LocalCluster, contract: ScriptedContract
) -> None:
    cluster._failed = RuntimeError("no memory is left")
    with pytest.raises(BatchRunError, match="the engine has failed: no memory is left"):
        await LocalAnswers(cluster).answer(REQUEST)
    assert contract.requests == []


async def test_an_engine_that_fails_for_good_meanwhile_ends_the_run(
    cluster: LocalCluster, contract: ScriptedContract
) -> None:
    def fail(_: pb.GenerateRequest) -> Iterable[Event | Exception | asyncio.Event]:
        cluster._failed = RuntimeError("no memory is left")
        for limit in cluster._limits:
            limit.reschedule(asyncio.get_running_loop().time())
        yield asyncio.Event()  # it never answers

    contract.script = fail
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(BatchRunError, match="the engine has failed: no memory is left"):
            await LocalAnswers(cluster).answer(REQUEST)
    assert contract.ended == 1
