"""Load for a small cluster that makes nearly every metric move."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvmesh.client import NO_RETRY, Client, KVMeshError
from kvmesh.cluster.lifecycle import Endpoint

CLIENTS = 8
PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
NEVER_FITS = [5] * 4000


def _generate(endpoint: Endpoint, number: int, over: threading.Event) -> None:
    """Prompts with a common beginning, long and short output, and now and then a refusal."""
    with Client(endpoint.target, api_key=endpoint.api_key, retry=NO_RETRY) as client:
        count = number
        while not over.is_set():
            count += 1
            try:
                if count % 7 == 0:
                    client.generate(NEVER_FITS, max_tokens=8)
                elif count % 5 == 0:
                    client.generate(PROMPT, max_tokens=600, timeout_s=30)
                else:
                    client.generate(f"{PROMPT} {count}", max_tokens=12 * (1 + count % 6))
            except KVMeshError:
                over.wait(0.2)


@contextmanager
def load(endpoint: Endpoint) -> Iterator[None]:
    """Requests until the end of the block."""
    over = threading.Event()
    threads = [
        threading.Thread(target=_generate, args=(endpoint, number, over), daemon=True)
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
