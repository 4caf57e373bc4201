"""A run whose answers need no model: they repeat the prompt.

python -m tests.cluster.batch.echo_run INPUT OUTPUT
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import msgspec

from kvmesh.cluster.batch.line_request import LineRequest
from kvmesh.cluster.batch.output_file import LineResponse, OutputFile
from kvmesh.cluster.batch.run import BatchRun, RunCounts


class EchoAnswers:
    """asked: custom_ids, in order; body: of every answer, if it is not the prompt"""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.body: msgspec.Raw | None = None

    async def answer(self, request: LineRequest) -> LineResponse:
        self.asked.append(request.custom_id)
        await asyncio.sleep(0)
        prompt = msgspec.json.decode(request.body)["prompt"]
        body = {"model": "echo", "prompt": prompt, "usage": {"completion_tokens": 2}}
        status = 400 if prompt == "bad" else 200
        echo_body = msgspec.Raw(msgspec.json.encode(body))
        return LineResponse(status, request.id, self.body or echo_body)


async def echo(source: str, target: str, answers: EchoAnswers | None = None) -> RunCounts:
    with contextlib.closing(OutputFile(target)) as output:
        run = BatchRun(source, output)
        run.survey()
        await run.run(answers or EchoAnswers(), at_once=4)
    return run.counts


if __name__ == "__main__":
    asyncio.run(echo(sys.argv[1], sys.argv[2]))
