"""OpenAI's API over a contract whose replies a test writes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.cluster.openai.server import HttpServer, ScriptedContract, http_server


@pytest.fixture
async def contract() -> ScriptedContract:
    return ScriptedContract()


@pytest.fixture
async def server(contract: ScriptedContract) -> AsyncIterator[HttpServer]:
    async with http_server(contract) as running:
        yield running
