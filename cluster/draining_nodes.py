"""Nodes of the Ray cluster that end soon, so that nothing new starts on them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import ray
from ray.exceptions import RayError

logger = logging.getLogger("ray.serve")

POLL_S = 1.0


async def follow_draining_nodes(note: Callable[[frozenset[str]], None]) -> None:
    """Ask Ray again and again; runs until cancelled.

    note: called with the ids of the nodes that drain, in hexadecimal
    """
    failed = False
    while True:
        try:
            note(await asyncio.to_thread(draining_nodes))
            failed = False
        except (RayError, RuntimeError, OSError) as error:
            if not failed:  # log the first failure only: Ray's head may be away for a while
                logger.warning("cannot ask Ray which nodes drain: %s", error)
            failed = True
        await asyncio.sleep(POLL_S)


def draining_nodes() -> frozenset[str]:
    """Ids in hexadecimal. Ray has no public function for it."""
    return frozenset(ray._private.state.state.get_draining_nodes())
