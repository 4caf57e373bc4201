from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmesh import LLM
from tests.cluster.offline.tiny_llm import tiny_llm


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """For all tests of a module, which leave nothing running."""
    with tiny_llm() as made:
        yield made
