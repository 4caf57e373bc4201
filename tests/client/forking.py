"""A program that forks while it has clients: `python -m tests.client.forking TARGET`.

It prints what a child can do with a client of its parent, with one that it makes itself, and
whether the parent's still works.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
from multiprocessing.connection import Connection

from kvmesh import AsyncClient, Client, UsageError


def in_child(target: str, blocking: Client, asynchronous: AsyncClient, found: Connection) -> None:
    try:
        blocking.tokenize("hi")
    except UsageError as error:
        found.send(str(error).replace(str(multiprocessing.current_process().pid), "PID"))
    found.send(asyncio.run(in_childs_loop(target, asynchronous)))
    blocking.close()
    with Client(target) as client:
        found.send(client.tokenize("hi").token_ids)


async def in_childs_loop(target: str, inherited: AsyncClient) -> str:
    try:
        await inherited.tokenize("hi")
    except UsageError as error:
        await inherited.close()
        return type(error).__name__
    return "worked"


async def main(target: str) -> None:
    with Client(target) as blocking:
        async with AsyncClient(target) as asynchronous:
            blocking.tokenize("hi")
            await asynchronous.tokenize("hi")
            context = multiprocessing.get_context("fork")
            receiver, sender = context.Pipe()
            child = context.Process(
                target=in_child, args=(target, blocking, asynchronous, sender), daemon=True
            )
            child.start()
            sender.close()
            for _ in range(3):
                print(await asyncio.to_thread(receiver.recv))
            child.join()
            print(child.exitcode)
            print(blocking.tokenize("hi").token_ids)
            print((await asynchronous.tokenize("hi")).token_ids)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
